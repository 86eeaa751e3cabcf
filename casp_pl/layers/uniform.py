"""Linear layer with uniform codes, as RTN and GPTQ make them (arXiv 2210.17323, section 4).

Letters: O out, I in, G = ceil(I / D) groups a row, D group size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from casp_pl.errors import ConfigError, IntegrityError
from casp_pl.kernels.compiled import LookupLoop
from casp_pl.kernels.lookup import loop_for
from casp_pl.kernels.packing import pack, pack_wide, packed_size, unpack, unpack_wide
from casp_pl.kernels.uniform import UniformCodes, dequantize_uniform
from casp_pl.layers.base import STORED_FLOAT_BITS, QuantizedLinear
from casp_pl.layers.cache import CodesCache
from casp_pl.layers.product import rebuilt_linear, row_tiles
from casp_pl.layers.uniform_rows import UniformRows

__all__ = ["UniformLinear", "column_groups_of", "require_groups"]


class UniformLinear(QuantizedLinear):
    """W[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g], g the group of column i.

    Groups are runs of D columns, g = i // D, or with `regrouped` any sets of D columns, the same in all rows. Where D
    does not divide I the last group is short; nothing is stored for the missing columns.

    Args:
        in_features: I.
        out_features: O.
        bits: of a code and of a zero point, 1 to 8.
        group_size: D.
        regrouped: whether the group of every column is stored.
        bias: whether there is a bias (O,).
        device: where the tensors are made; None for torch's default.
        dtype: of scales and bias.

    Attributes:
        codes: buffer, the codes (O, I) packed at `bits` bits, flat uint8.
        zeros: buffer, the zero points (O, G) packed likewise.
        column_groups: buffer of a regrouped layer, else None: the group of every column (I,) packed at as many bits
            as the largest takes.
        scales: Parameter (O, G).
    """

    kind = "uniform"
    codes: Tensor
    zeros: Tensor
    column_groups: Tensor | None

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int = 64,
        regrouped: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(in_features=in_features, out_features=out_features, bias=bias, device=device, dtype=dtype)
        if not 1 <= bits <= 8 or group_size < 1:
            raise ConfigError(f"uniform codes have 1 to 8 bits and groups of at least 1, not {bits} and {group_size}")
        self.bits = bits
        self.group_size = group_size
        self.groups = -(-in_features // group_size)
        for name, count in (("codes", self.weight_count), ("zeros", out_features * self.groups)):
            self.register_buffer(name, torch.zeros(packed_size(count, bits), dtype=torch.uint8, device=device))
        runs = torch.arange(in_features, device="cpu") // group_size  # packing reads values, and meta has none
        packed = pack_wide(runs, _group_bits(in_features, group_size)).to(self.codes.device) if regrouped else None
        self.register_buffer("column_groups", packed)
        self.scales = nn.Parameter(torch.zeros(out_features, self.groups, device=device, dtype=dtype))
        self._grid: CodesCache[Tensor] = CodesCache()
        self._sorted: CodesCache[tuple[Tensor, Tensor]] = CodesCache()
        self._rows: CodesCache[UniformRows] = CodesCache()
        self._turned: CodesCache[tuple[Tensor, Tensor]] = CodesCache()

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        zeros: Tensor,
        scales: Tensor,
        *,
        bits: int,
        group_size: int,
        column_groups: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> "UniformLinear":
        """The layer of given codes and tables, on the device and in the dtype of the scales.

        Args:
            codes: integers of `bits` bits (O, I).
            zeros: likewise (O, G).
            scales: (O, G).
            bits: of codes and zeros.
            group_size: D.
            column_groups: the group of every column (I,), D columns in each; None for runs of columns.
            bias: (O,).
        """
        layer = cls(
            in_features=codes.shape[1],
            out_features=codes.shape[0],
            bits=bits,
            group_size=group_size,
            regrouped=column_groups is not None,
            bias=bias is not None,
            device=scales.device,
            dtype=scales.dtype,
        )
        layer.set_codes(codes)
        with torch.no_grad():
            layer.zeros.copy_(pack(zeros, bits))
            layer.scales.copy_(scales)
            if layer.column_groups is not None and column_groups is not None:
                layer.column_groups.copy_(pack_wide(column_groups, _group_bits(layer.in_features, group_size)))
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer

    def codes_unpacked(self) -> Tensor:
        """The codes (O, I) as uint8, a copy."""
        return unpack(self.codes, self.weight_count, self.bits).view(self.out_features, self.in_features).clone()

    def zeros_unpacked(self) -> Tensor:
        """The zero points (O, G) as uint8, a copy."""
        return unpack(self.zeros, self.scales.numel(), self.bits).view(self.scales.shape).clone()

    def column_groups_unpacked(self) -> Tensor:
        """The group of every column (I,) as int64.

        Raises:
            IntegrityError: a regrouped layer whose groups do not have D columns each.
        """
        if self.column_groups is None:
            return torch.arange(self.in_features, device=self.codes.device) // self.group_size
        return column_groups_of(self.column_groups, self.in_features, self.group_size)

    def set_codes(self, codes: Tensor) -> None:
        """Replaces all codes (O, I), in place.

        Raises:
            ValueError: another shape, or a code that does not fit into the bits.
        """
        if codes.shape != (self.out_features, self.in_features):
            raise ValueError(f"this layer has codes {(self.out_features, self.in_features)}, not {tuple(codes.shape)}")
        self.codes.copy_(pack(codes, self.bits))
        self.free_cache()
        self.release()

    def dequantize(self) -> Tensor:
        """The weight (O, I), differentiable with respect to the scales."""
        codes, columns = self._in_groups()
        weight = self._weight(codes, slice(0, self.out_features))
        return weight if columns is None else weight.index_select(1, columns.argsort())

    def multiply(self, x: Tensor) -> Tensor:
        """By look-up for a few tokens that no gradient is wanted of, else by way of the dense weight."""
        loop = loop_for(x, (self.out_features, self.in_features), UniformRows.length(self.bits))
        if loop is None:
            tiles = row_tiles(self.out_features, self.in_features, self.codes.device)
            codes, columns = self._in_groups()
            x = x if columns is None else x.index_select(-1, columns)  # tokens are fewer than rows of a weight
            return rebuilt_linear(x, lambda tile: self._weight(codes, tile), tiles, (self.scales,), self.bias)
        rows = self._rows.get(lambda: self._arrange(loop), *self._code_tensors)
        scales, offsets = self._turned.get(self._turn, *self._code_tensors, self.scales)
        return self.output_of(rows.multiply(x.reshape(-1, self.in_features), scales, offsets), x)

    @property
    def code_bits(self) -> int:
        """O I bits."""
        return self.weight_count * self.bits

    @property
    def storage_bits(self) -> int:
        """Codes, zero points, 16-bit scales and stored groups; all but scales fill whole bytes each."""
        grouping = 0 if self.column_groups is None else self.column_groups.numel()
        packed = 8 * (self.codes.numel() + self.zeros.numel() + grouping)
        return packed + STORED_FLOAT_BITS * self.scales.numel()

    def tables(self) -> dict[str, nn.Parameter]:
        """Scales."""
        return {"scales": self.scales}

    def structure(self) -> dict[str, Any]:
        """Bits and group size; `regrouped` only where it is true."""
        regrouped = {} if self.column_groups is None else {"regrouped": True}
        return {"bits": self.bits, "group_size": self.group_size, **regrouped}

    def free_cache(self) -> None:
        """Drops what is made of codes, zero points and scales; the largest are as large as the codes."""
        for cache in (self._grid, self._sorted, self._rows, self._turned):
            cache.clear()

    def _weight(self, codes: Tensor, tile: slice) -> Tensor:
        """Rows of the weight (rows, I) of packed codes."""
        first, last = (row * self.in_features * self.bits // 8 for row in (tile.start, tile.stop))
        last = len(codes) if tile.stop == self.out_features else last
        zeros = self._grid.get(self.zeros_unpacked, self.zeros)[tile]
        rows = UniformCodes(codes[first:last], zeros, self.bits, self.group_size, self.in_features)
        return dequantize_uniform(rows, self.scales[tile])

    def _in_groups(self) -> tuple[Tensor, Tensor | None]:
        """Packed codes with the columns of a group side by side, and the column of x that each of them meets (I,)."""
        return (self.codes, None) if self.column_groups is None else self._sorted.get(self._sort, *self._code_tensors)

    def _sort(self) -> tuple[Tensor, Tensor]:
        columns = self.column_groups_unpacked().argsort(stable=True)
        return pack(self.codes_unpacked()[:, columns], self.bits), columns

    @property
    def _code_tensors(self) -> list[Tensor]:
        return [self.codes, self.zeros, *([] if self.column_groups is None else [self.column_groups])]

    def _arrange(self, loop: LookupLoop) -> UniformRows:
        codes = self.codes_unpacked()
        if self.column_groups is None:
            return UniformRows(codes, self.bits, self.group_size, None, loop)
        columns = self.column_groups_unpacked().argsort(stable=True)
        return UniformRows(codes[:, columns], self.bits, self.group_size, columns, loop)

    def _turn(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points times scales (G, O)."""
        scales = self.scales.float().T.contiguous()
        return scales, self.zeros_unpacked().T * scales


def column_groups_of(packed: Tensor, in_features: int, group_size: int) -> Tensor:
    """The group of every column (I,) as int64, of what a regrouped layer stores.

    Raises:
        IntegrityError: groups that do not have D columns each, or bytes of another number of columns.
    """
    groups = unpack_wide(packed, in_features, _group_bits(in_features, group_size))
    require_groups(groups, group_size)
    return groups


def require_groups(groups: Tensor, group_size: int) -> None:
    """Passes silently where the groups of the columns (I,) have D columns each, the last one what is left.

    Raises:
        IntegrityError: they do not.
    """
    if not torch.equal(groups.sort().values, torch.arange(len(groups), device=groups.device) // group_size):
        raise IntegrityError(
            f"the {len(groups)} columns are not put into groups of {group_size}: they are broken or of another layer"
        )


def _group_bits(in_features: int, group_size: int) -> int:
    """Bits that the largest group number takes."""
    return max(1, (-(-in_features // group_size) - 1).bit_length())
