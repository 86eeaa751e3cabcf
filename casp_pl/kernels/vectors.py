"""Codes that are decoded eight weights at a time (`numba_vectors`), in the layouts in which they are stored.

Letters: N tokens, O rows, I in, G groups of 8 inputs, S spans of groups with scales of their own.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from casp_pl.kernels.compiled import VectorLoops
from casp_pl.kernels.lattice import GROUP_LENGTH, QUARTER, e8p_even_patterns, e8p_patterns
from casp_pl.kernels.packing import pack

__all__ = ["E8PRows", "UniformBytes", "e8p_byte_tables"]

_SIGNS = 7
_AHEAD = 4  # bytes that the loop over uniform codes reads at once


@lru_cache(maxsize=1)
def e8p_byte_tables() -> Tensor:
    """What the bytes of a code of E8P stand for (3, 256, 8), int8: point = (first[low] ^ second[high]) + third[high].

    First the patterns in quarters, the eighth coordinate negated where a point has an odd number of minus signs; then
    all bits of the coordinates that the high byte negates, as the eighth sign follows from the others; then what
    completes their negation, and the shift.
    """
    with torch.inference_mode(False):
        patterns = (e8p_patterns(torch.device("cpu")) / QUARTER).to(torch.int8)
        patterns[e8p_even_patterns() :, -1] *= -1
        high = torch.arange(256, device="cpu")
        minus = high[:, None] >> torch.arange(_SIGNS, device="cpu") & 1
        minus = torch.cat([minus, minus.sum(dim=1, keepdim=True) % 2], dim=1)
        shift = 1 - 2 * (high >> _SIGNS)
        return torch.stack([patterns, -minus.to(torch.int8), (minus + shift[:, None]).to(torch.int8)])


class E8PRows:
    """Rows of points of E8P.

    Args:
        codes: uint8 (O, G, 2), the low byte first; at least 4 rows.
        scale: points are multiplied with it.
        loops: of this machine.
    """

    def __init__(self, codes: Tensor, scale: float, loops: VectorLoops) -> None:
        self._codes, self._loops, self._tables = codes.contiguous(), loops, e8p_byte_tables()
        self._weights = torch.full((1, len(codes)), scale * QUARTER)

    def multiply(self, x: Tensor) -> Tensor:
        """Products with the scaled points in float32: x (N, 8 G) -> (N, O)."""
        sums = torch.empty(len(x), len(self._codes))
        self._loops.e8p(x.float().view(len(x), -1, GROUP_LENGTH), self._tables, self._codes, self._weights, sums)
        return sums


class UniformBytes:
    """Rows of whole numbers of 1 to 4 bits, or of 8, packed.

    Args:
        codes: uint8 (O, I), at least 4 rows.
        bits: of a code.
        group_size: columns that share a scale.
        loops: of this machine.
    """

    unit = 8  # codes that are decoded at once: every group is filled up to a multiple

    def __init__(self, codes: Tensor, bits: int, group_size: int, loops: VectorLoops) -> None:
        self._rows, self._bits, self._loops = len(codes), bits, loops
        filling = -group_size % self.unit
        whole = F.pad(codes, (0, -codes.shape[1] % group_size)).view(len(codes), -1, group_size)
        self._span = (group_size + filling) // self.unit
        self._codes = F.pad(pack(F.pad(whole, (0, filling)), bits), (0, _AHEAD))

    def multiply(self, x: Tensor, scales: Tensor) -> Tensor:
        """Products in float32: x (N, 8 G), every group filled up, and scales (S, O) -> (N, O)."""
        sums = torch.empty(len(x), self._rows)
        inputs = x.view(len(x), -1, self.unit)
        self._loops.uniform(inputs, self._bits, self._codes, scales.float().contiguous(), self._span, sums)
        return sums
