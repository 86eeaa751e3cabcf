"""Codes that are decoded eight weights at a time (`numba_vectors`), in the layouts in which they are stored.

Letters: N tokens, O rows, I in, G groups of 8 inputs, S spans of groups with scales of their own.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from casp_pl.kernels.compiled import VectorLoops
from casp_pl.kernels.lattice import GROUP_LENGTH, LATTICE_STAGES, QUARTER, e8_residual, e8p_even_patterns, e8p_patterns
from casp_pl.kernels.packing import pack

__all__ = ["LatticeBytes", "UniformBytes", "e8p_tables", "lattice_tables"]

_SIGNS = 7
_AHEAD = 4  # bytes that the loop over uniform codes reads at once


@lru_cache(maxsize=1)
def e8p_tables() -> tuple[Tensor, Tensor, Tensor]:
    """What the bytes of a code of E8P stand for, in float32: point = first[low] * second[high] + third[high].

    First the patterns (256, 8), the eighth coordinate negated where a point has an odd number of minus signs; then the
    signs (256, 8), of which the eighth follows from the others; then the shifts (256, 1).
    """
    with torch.inference_mode(False):
        patterns = e8p_patterns(torch.device("cpu")).clone()
        patterns[e8p_even_patterns() :, -1] *= -1
        high = torch.arange(256, device="cpu").unsqueeze(1)
        minus = high >> torch.arange(_SIGNS, device="cpu") & 1
        minus = torch.cat([minus, minus.sum(dim=1, keepdim=True) % 2], dim=1)
        signs, shifts = ((1 - 2 * bits).to(torch.float32) for bits in (minus, high >> _SIGNS))
        return patterns, signs, QUARTER * shifts


@lru_cache(maxsize=len(LATTICE_STAGES))
def lattice_tables(bits: int) -> Tensor:
    """`e8p_tables` and what the second stage needs, one after the other: flat, float32.

    Behind the shifts stands the residual codebook (256, 8), divided by its scale, or what the second point of E8P is
    multiplied with.
    """
    with torch.inference_mode(False):
        parts = list(e8p_tables())
        for stage in LATTICE_STAGES[bits][1:]:
            quarters = e8_residual(torch.device("cpu")).to(torch.float32)
            fine = quarters * QUARTER if stage.kind == "e8" else torch.ones(1, dtype=torch.float32, device="cpu")
            parts.append(fine / stage.scale)
        return torch.cat([part.flatten() for part in parts])


class LatticeBytes:
    """Rows of points of E8P, with finer ones from 3 bits on.

    Args:
        codes: uint8 (O, G, bits), as they are stored; at least 4 rows.
        loops: of this machine.
    """

    def __init__(self, codes: Tensor, loops: VectorLoops) -> None:
        self._codes, self._loops, self._tables = codes.contiguous(), loops, lattice_tables(codes.shape[2])
        self._weights = torch.ones(1, len(codes), dtype=torch.float32, device=codes.device)

    def multiply(self, x: Tensor) -> Tensor:
        """Products with the points in float32: x (N, 8 G) -> (N, O)."""
        sums = torch.empty(len(x), len(self._codes), dtype=torch.float32, device=x.device)
        self._loops.lattice(x.float().view(len(x), -1, GROUP_LENGTH), self._tables, self._codes, self._weights, sums)
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
        sums = torch.empty(len(x), self._rows, dtype=torch.float32, device=x.device)
        inputs = x.view(len(x), -1, self.unit)
        self._loops.uniform(inputs, self._bits, self._codes, scales.float().contiguous(), self._span, sums)
        return sums
