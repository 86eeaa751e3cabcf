"""Linear layer with additive codes, as AQLM makes them (arXiv 2401.06118, section 3.1).

Letters: O out, I in, G = ceil(I / D) groups a row, K codebooks, C entries a codebook, D group length.
"""

from typing import Any

import torch
from torch import Tensor, nn

from casp_pl.errors import ConfigError
from casp_pl.kernels.additive import AdditiveIndex, dequantize_additive
from casp_pl.kernels.lookup import CodeRows, loop_for
from casp_pl.kernels.packing import pack, packed_size, unpack
from casp_pl.layers.base import STORED_FLOAT_BITS, QuantizedLinear
from casp_pl.layers.cache import CodesCache
from casp_pl.layers.product import rebuilt_linear, row_tiles

__all__ = ["AdditiveLinear"]


class AdditiveLinear(QuantizedLinear):
    """W[o, gD : (g+1)D] = scales[o] * sum_k codebooks[k, codes[o, g, k]].

    Where D does not divide I the last group is padded: its codes are stored in full, its surplus columns are cut off.

    Args:
        in_features: I.
        out_features: O.
        num_codebooks: K.
        entries: C, a power of two from 2 to 256.
        group_length: D.
        bias: whether there is a bias (O,).
        device: where the tensors are made; None for torch's default.
        dtype: of codebooks, scales and bias.

    Attributes:
        codes: buffer, the codes (O, G, K) packed at log2(C) bits, flat uint8.
        codebooks: Parameter (K, C, D).
        scales: Parameter (O, 1).
    """

    kind = "additive"
    codes: Tensor

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        num_codebooks: int,
        entries: int = 256,
        group_length: int = 8,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(in_features=in_features, out_features=out_features, bias=bias, device=device, dtype=dtype)
        if entries not in (2, 4, 8, 16, 32, 64, 128, 256):
            raise ConfigError(f"a codebook has 2, 4, 8 ... 256 entries, not {entries}")
        self.num_codebooks = num_codebooks
        self.entries = entries
        self.group_length = group_length
        self.groups = -(-in_features // group_length)
        size = packed_size(self._code_count, self._code_width)
        self.register_buffer("codes", torch.zeros(size, dtype=torch.uint8, device=device))
        self.codebooks = nn.Parameter(torch.zeros(num_codebooks, entries, group_length, device=device, dtype=dtype))
        self.scales = nn.Parameter(torch.zeros(out_features, 1, device=device, dtype=dtype))
        self._indices: CodesCache[dict[int, AdditiveIndex]] = CodesCache()
        self._rows: CodesCache[CodeRows] = CodesCache()

    @classmethod
    def from_codes(
        cls, codes: Tensor, codebooks: Tensor, scales: Tensor, *, in_features: int, bias: Tensor | None = None
    ) -> "AdditiveLinear":
        """The layer of given codes and tables, on the device and in the dtype of the codebooks.

        Args:
            codes: integers below C (O, G, K).
            codebooks: (K, C, D).
            scales: (O, 1).
            in_features: I, at most G * D.
            bias: (O,).
        """
        num_codebooks, entries, group_length = codebooks.shape
        layer = cls(
            in_features=in_features,
            out_features=codes.shape[0],
            num_codebooks=num_codebooks,
            entries=entries,
            group_length=group_length,
            bias=bias is not None,
            device=codebooks.device,
            dtype=codebooks.dtype,
        )
        layer.set_codes(codes)
        with torch.no_grad():
            layer.codebooks.copy_(codebooks)
            layer.scales.copy_(scales)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer

    def codes_unpacked(self) -> Tensor:
        """The codes (O, G, K) as uint8, a copy."""
        return self._unpacked().clone()

    def set_codes(self, codes: Tensor) -> None:
        """Replaces all codes (O, G, K), in place.

        Raises:
            ValueError: another shape, or a code of C or more.
        """
        if codes.shape != self._code_shape:
            raise ValueError(f"this layer has codes {tuple(self._code_shape)}, not {tuple(codes.shape)}")
        self.codes.copy_(pack(codes, self._code_width))
        self.free_cache()
        self.release()

    def dequantize(self) -> Tensor:
        """The weight (O, I), differentiable with respect to codebooks and scales."""
        parts = [self._weight(tile) for tile in self._tiles]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def multiply(self, x: Tensor) -> Tensor:
        """By look-up for a few tokens that no gradient is wanted of, else by way of the dense weight."""
        loop = loop_for(x, (self.out_features, self.in_features), self.group_length)
        if loop is None:
            return rebuilt_linear(x, self._weight, self._tiles, (self.codebooks, self.scales), self.bias)
        rows = self._rows.get(lambda: CodeRows(self._unpacked().flatten(1), loop), self.codes)
        return self.output_of(rows.multiply(x.reshape(-1, self.in_features), self.codebooks, self.scales.T), x)

    @property
    def bits(self) -> float:
        """Of the codes, a weight of a whole group: K log2(C) / D."""
        return self.num_codebooks * self._code_width / self.group_length

    @property
    def code_bits(self) -> int:
        """O G K log2(C)."""
        return self._code_count * self._code_width

    @property
    def storage_bits(self) -> int:
        """O G K log2(C) + 16 K C D + 16 O."""
        return self.code_bits + STORED_FLOAT_BITS * (self.codebooks.numel() + self.scales.numel())

    def tables(self) -> dict[str, nn.Parameter]:
        """Codebooks and scales."""
        return {"codebooks": self.codebooks, "scales": self.scales}

    def structure(self) -> dict[str, Any]:
        """K, C and D."""
        return {"num_codebooks": self.num_codebooks, "entries": self.entries, "group_length": self.group_length}

    def free_cache(self) -> None:
        """Drops the unpacked codes in both layouts."""
        self._indices.clear()
        self._rows.clear()

    @property
    def _tiles(self) -> list[slice]:
        return row_tiles(self.out_features, self.in_features, self.codes.device)

    def _weight(self, tile: slice) -> Tensor:
        """Rows of the weight (rows, I)."""
        index = self._indices.get(self._index_tiles, self.codes)[tile.start]
        weight = dequantize_additive(index, self.codebooks, self.scales[tile])
        return weight if weight.shape[1] == self.in_features else weight[:, : self.in_features].contiguous()

    def _index_tiles(self) -> dict[int, AdditiveIndex]:
        """By the first row of a tile."""
        codes = self.codes_unpacked()
        return {tile.start: AdditiveIndex(codes[tile], self.entries) for tile in self._tiles}

    def _unpacked(self) -> Tensor:
        """The codes (O, G, K) as uint8; codes of 8 bits are not copied."""
        return unpack(self.codes, self._code_count, self._code_width).view(self._code_shape)

    @property
    def _code_shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.groups, self.num_codebooks))

    @property
    def _code_count(self) -> int:
        return self._code_shape.numel()

    @property
    def _code_width(self) -> int:
        return self.entries.bit_length() - 1
