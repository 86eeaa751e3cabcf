"""Linear layer with codes in a lattice, as QuIP# makes them (arXiv 2402.04396).

Letters: O out, I in, G = ceil(I / 8) groups a row, P = 8 G, S stages.
"""

from typing import Any

import torch
from torch import Tensor, nn

from casp_pl.errors import ConfigError
from casp_pl.kernels.lattice import GROUP_LENGTH, LATTICE_STAGES, pack_lattice, unpack_lattice
from casp_pl.kernels.lookup import loop_for
from casp_pl.layers.base import STORED_FLOAT_BITS, QuantizedLinear, output_dtype
from casp_pl.layers.cache import CodesCache
from casp_pl.layers.lattice_rows import LatticeRows
from casp_pl.layers.lattice_weight import dequantize_lattice, lattice_points, multiply_lattice
from casp_pl.layers.product import rebuilt_linear, row_tiles

__all__ = ["LatticeLinear"]


class LatticeLinear(QuantizedLinear):
    """W = diag(sv) U_O^T Z U_P diag(su), Z made of points of E8P and, from 3 bits on, of a residual codebook.

    The scale of the whole weight lies in sv. Codebooks and transforms are computed, not stored. Where 8 does not divide
    I, the inputs are padded with zeros before they are transformed: the codes of P columns are stored in full.

    Args:
        in_features: I.
        out_features: O.
        bits: 2, 3 or 4.
        bias: whether there is a bias (O,).
        device: where the tensors are made; None for torch's default.
        dtype: of su, sv and bias.

    Attributes:
        codes: buffer (O, G, bits), uint8: every group of 8 weights takes as many bytes as a weight takes bits.
        su: Parameter (I,), signs and scales of the inputs.
        sv: Parameter (O,), signs and scales of the outputs.
    """

    kind = "lattice"
    codes: Tensor

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        bits: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(in_features=in_features, out_features=out_features, bias=bias, device=device, dtype=dtype)
        if bits not in LATTICE_STAGES:
            raise ConfigError(f"lattice codes have {', '.join(map(str, LATTICE_STAGES))} bits, not {bits}")
        self.bits = bits
        self.groups = -(-in_features // GROUP_LENGTH)
        codes = torch.zeros(out_features, self.groups, bits, dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes)
        self.su = nn.Parameter(torch.zeros(in_features, device=device, dtype=dtype))
        self.sv = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        self._rows: CodesCache[LatticeRows] = CodesCache()

    @classmethod
    def from_codes(
        cls, codes: Tensor, su: Tensor, sv: Tensor, *, bits: int, bias: Tensor | None = None
    ) -> "LatticeLinear":
        """The layer of given codes and vectors, on the device and in the dtype of the vectors.

        Args:
            codes: integers (S, O, G), below 65,536 where a stage is E8P, else below 256.
            su: (I,).
            sv: (O,).
            bits: 2, 3 or 4.
            bias: (O,).
        """
        layer = cls(
            in_features=len(su),
            out_features=len(sv),
            bits=bits,
            bias=bias is not None,
            device=su.device,
            dtype=su.dtype,
        )
        layer.set_codes(codes)
        with torch.no_grad():
            layer.su.copy_(su)
            layer.sv.copy_(sv)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer

    def codes_unpacked(self) -> Tensor:
        """The codes (S, O, G) as int64."""
        return unpack_lattice(self.codes, self.bits)

    def set_codes(self, codes: Tensor) -> None:
        """Replaces all codes (S, O, G), in place.

        Raises:
            ValueError: another shape, or a code that is no point.
        """
        stages = LATTICE_STAGES[self.bits]
        shape = (len(stages), self.out_features, self.groups)
        if tuple(codes.shape) != shape:
            raise ValueError(f"this layer has codes {shape}, not {tuple(codes.shape)}")
        for stage, own in zip(stages, codes, strict=True):
            if own.numel() and (int(own.min()) < 0 or int(own.max()) >> (8 * stage.num_bytes)):
                raise ValueError(f"codes from {int(own.min())} to {int(own.max())} are no points of {stage.kind}")
        self.codes.copy_(pack_lattice(codes, self.bits))
        self.free_cache()
        self.release()

    def dequantize(self) -> Tensor:
        """The weight (O, I), differentiable with respect to su and sv."""
        return dequantize_lattice(self.codes, self.su, self.sv)

    def multiply(self, x: Tensor) -> Tensor:
        """By transforming inputs and outputs: they are fewer than weights, and no gradient of a weight is needed.

        Of a few tokens that no gradient is wanted of the products with Z are looked up.
        """
        width = GROUP_LENGTH * self.groups
        loop = loop_for(x, (self.out_features, self.in_features), GROUP_LENGTH)
        if loop is None:
            tiles = row_tiles(self.out_features, width, x.device)

            def product(mixed: Tensor) -> Tensor:
                return rebuilt_linear(mixed, lambda tile: lattice_points(self.codes[tile], x.dtype), tiles, ())

            y = multiply_lattice(x, product, self.su, self.sv, width)
            return (y if self.bias is None else y + self.bias).to(output_dtype(x))
        rows = self._rows.get(lambda: LatticeRows(self.codes, self.bits, loop), self.codes)
        inputs = x.reshape(-1, self.in_features).float()
        return self.output_of(multiply_lattice(inputs, rows.multiply, self.su, self.sv, width), x)

    @property
    def code_bits(self) -> int:
        """O P bits."""
        return 8 * self.codes.numel()

    @property
    def storage_bits(self) -> int:
        """O P bits + 16 I + 16 O."""
        return self.code_bits + STORED_FLOAT_BITS * (self.su.numel() + self.sv.numel())

    def tables(self) -> dict[str, nn.Parameter]:
        """The vectors su and sv."""
        return {"su": self.su, "sv": self.sv}

    def structure(self) -> dict[str, Any]:
        """Bits."""
        return {"bits": self.bits}

    def free_cache(self) -> None:
        """Drops the rows for look-up, as large as the codes."""
        self._rows.clear()
