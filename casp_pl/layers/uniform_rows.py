"""Uniform codes prepared for products with a few tokens: eight decoded at once, or a byte of them looked up.

Letters: O out, I in, G groups a row, D group size, N tokens.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from casp_pl.kernels.compiled import LookupLoop
from casp_pl.kernels.lookup import CodeRows
from casp_pl.kernels.uniform import byte_codebook, bytes_of_codes, codes_per_byte
from casp_pl.kernels.vectors import UniformBytes

__all__ = ["UniformRows"]

_DECODED = (1, 2, 3, 4, 8)  # bits of a code that are unpacked in registers


class UniformRows:
    """Rows of a uniform weight, products with which are looked up.

    Args:
        codes: of `bits` bits (O, I), uint8, columns of a group side by side.
        bits: of a code.
        group_size: D.
        columns: the column of x that every column of the codes meets (I,); None where they are in order.
        loop: one of `lookup_loops`.
    """

    def __init__(self, codes: Tensor, bits: int, group_size: int, columns: Tensor | None, loop: LookupLoop) -> None:
        self._group_size, self._columns = group_size, columns
        self._products: Callable[[Tensor, Tensor], Tensor]
        unit = self.length(bits)
        if (vectors := loop.taking(unit, len(codes)).vectors) is not None:
            self._products = UniformBytes(codes, bits, group_size, vectors).multiply
        else:
            rows, unit = CodeRows(bytes_of_codes(codes, bits, group_size), loop), codes_per_byte(bits)
            codebook = byte_codebook(bits).to(codes.device)
            self._products = lambda x, scales: rows.multiply(x, codebook, scales)
        self._filling = -group_size % unit

    @staticmethod
    def length(bits: int) -> int:
        """Weights that vectors decode at once, or else that a byte stands for."""
        return UniformBytes.unit if bits in _DECODED else codes_per_byte(bits)

    def multiply(self, x: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
        """Products in float32.

        Args:
            x: (N, I).
            scales: (G, O).
            offsets: zero points times scales (G, O).

        Returns:
            (N, O).
        """
        x = x.float() if self._columns is None else x.float().index_select(1, self._columns)
        grouped = _filled(x, -x.shape[1] % self._group_size).view(x.shape[0], -1, self._group_size)
        inputs = _filled(grouped, self._filling).flatten(1)
        return self._products(inputs, scales).addmm_(grouped.sum(dim=2), offsets, alpha=-1)


def _filled(x: Tensor, count: int) -> Tensor:
    """X with so many zeros at the end of its last dimension; x itself for none, since an empty pad copies it."""
    return F.pad(x, (0, count)) if count else x
