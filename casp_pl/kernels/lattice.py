"""The E8P codebook of QuIP# and its residual codebook: 65,536 and 256 points of R^8 that no file has to hold.

A point of E8P is an absolute pattern with signs, shifted:

    point = signs * pattern +- 1/4        (QuIP#, arXiv 2402.04396, section 4)

Patterns are vectors of 1/2, 3/2 and 5/2. Before the shift a point lies in D8 + 1/2: its coordinates have an even sum,
so the eighth sign follows from the pattern and the other seven. A code is the number of the pattern (low byte), the
signs of the first seven coordinates (bits 8 to 14, 1 for minus) and the shift (bit 15, 1 for -1/4).

There are 227 patterns of squared norm up to 10. Which 29 of the 224 of norm 12 complete the 256 is free: every seventh
costs a Gaussian 0.0910 per weight, and no choice that was tried less. The residual codebook has the 240 points of norm
2 of E8 and the 16 of norm 4 on the axes.

All coordinates are multiples of 1/4. Tables hold them as int8 quarters, which decode exactly and at a byte a weight.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "GROUP_LENGTH",
    "LATTICE_STAGES",
    "LatticeStage",
    "QUARTER",
    "decode_e8p_reference",
    "decode_points",
    "e8_residual",
    "e8p_even_patterns",
    "e8p_patterns",
    "e8p_pairs",
    "e8p_points",
    "pairs_of",
    "pack_lattice",
    "unpack_lattice",
]

GROUP_LENGTH = 8
QUARTER = 0.25

_PATTERNS = 256
_SHORT, _LONG = 10, 12  # squared norms
_STRIDE = 7
_SIGNS = 7


@lru_cache(maxsize=8)
def e8p_patterns(device: torch.device) -> Tensor:
    """The absolute patterns (256, 8) in float32; first those whose points have an even number of minus signs."""
    with torch.inference_mode(False):
        halves = torch.cartesian_prod(*[torch.tensor([1, 3, 5], dtype=torch.float32, device="cpu")] * GROUP_LENGTH) / 2
        norms = halves.square().sum(dim=1)
        patterns = torch.cat([halves[norms <= _SHORT], halves[norms == _LONG][::_STRIDE]])[:_PATTERNS]
        return patterns[(patterns.sum(dim=1) % 2).argsort(stable=True)].to(device)


@lru_cache(maxsize=1)
def e8p_even_patterns() -> int:
    """How many patterns have points with an even number of minus signs."""
    return int((e8p_patterns(torch.device("cpu")).sum(dim=1) % 2 == 0).sum())


@lru_cache(maxsize=8)
def e8p_points(device: torch.device) -> Tensor:
    """All points of E8P by code (65536, 8), int8 quarters."""
    with torch.inference_mode(False):
        minus = torch.arange(1 << _SIGNS, device=device)[:, None] >> torch.arange(_SIGNS, device=device) & 1  # (128, 7)
        odd = torch.arange(_PATTERNS, device=device) >= e8p_even_patterns()
        eighth = (minus.sum(dim=1, keepdim=True) + odd) % 2  # (128, 256)
        minus = torch.cat([minus[:, None].expand(-1, _PATTERNS, -1), eighth[:, :, None]], dim=2)
        lattice = (1 - 2 * minus) * (e8p_patterns(device) / QUARTER)  # (128, 256, 8)
        return torch.stack([lattice + 1, lattice - 1]).view(-1, GROUP_LENGTH).to(torch.int8)


@lru_cache(maxsize=8)
def e8p_pairs(device: torch.device) -> Tensor:
    """What two neighbouring coordinates of a point of E8P can be (72, 2), int8 quarters: 6 x 6 for each shift."""
    with torch.inference_mode(False):
        values = torch.tensor([-10, -6, -2, 2, 6, 10], dtype=torch.int8, device=device)
        return torch.cat([torch.cartesian_prod(values, values) + shift for shift in (1, -1)])


def pairs_of(points: Tensor) -> Tensor:
    """Numbers in `e8p_pairs` of the pairs of neighbouring coordinates: int8 quarters (..., P) -> uint8 (..., P / 2)."""
    shift = (points & 3 == 3).to(torch.int8) * 2 - 1  # 2, 6, 10, -2 ... are 2 modulo 4
    values = (points - shift + 10) // 4
    numbers: Tensor = (shift[..., ::2] < 0) * 36 + values[..., ::2] * 6 + values[..., 1::2]
    return numbers.to(torch.uint8)


@lru_cache(maxsize=8)
def e8_residual(device: torch.device) -> Tensor:
    """The residual codebook (256, 8), int8 quarters: 112 + 128 points of norm 2 and 16 of norm 4 of the lattice E8."""
    with torch.inference_mode(False):
        whole = torch.cartesian_prod(*[torch.tensor([-1, 0, 1], dtype=torch.float32, device="cpu")] * GROUP_LENGTH)
        half = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5], dtype=torch.float32, device="cpu")] * GROUP_LENGTH)
        axes = 2 * torch.eye(GROUP_LENGTH, dtype=torch.float32, device="cpu")
        points = torch.cat([whole[whole.square().sum(dim=1) == 2], half[half.sum(dim=1) % 2 == 0], axes, -axes])
        return (points / QUARTER).to(device, torch.int8)


def decode_e8p_reference(codes: Tensor) -> Tensor:
    """Points of E8P as the formula has them: codes (N,) -> (N, 8) float32. The oracle of `e8p_points`."""
    pattern = e8p_patterns(codes.device)[codes & 0xFF]
    minus = codes[:, None] >> torch.arange(GROUP_LENGTH, GROUP_LENGTH + _SIGNS, device=codes.device) & 1
    eighth = (minus.sum(dim=1, keepdim=True) + pattern.sum(dim=1, keepdim=True)) % 2
    shift = (1 - 2 * (codes >> 15)).to(torch.float32) * QUARTER
    return pattern * (1 - 2 * torch.cat([minus, eighth], dim=1)) + shift[:, None]


def decode_points(codes: Tensor, points: Tensor) -> Tensor:
    """Points of codes: integers (N,), table int8 (C, 8) -> (N, 8) int8. A point is gathered as one word of 8 bytes."""
    words = points.view(torch.int64).view(-1)
    return words.index_select(0, codes).view(torch.int8).view(-1, GROUP_LENGTH)


class LatticeStage(NamedTuple):
    """One codebook of a code, and how much finer than the first it is.

    Attributes:
        kind: "e8p" (16 bits) or "e8" (8 bits).
        scale: the residual is multiplied by it before it is encoded and divided by it after it is decoded.
    """

    kind: str
    scale: float

    @property
    def num_bytes(self) -> int:
        """Of a code."""
        return 2 if self.kind == "e8p" else 1

    def points(self, device: torch.device) -> Tensor:
        """The codebook (C, 8), int8 quarters."""
        return e8p_points(device) if self.kind == "e8p" else e8_residual(device)


# The only place where residual scales are written: encoding and decoding both read them here.
LATTICE_STAGES = {
    2: (LatticeStage("e8p", 1.0),),
    3: (LatticeStage("e8p", 1.0), LatticeStage("e8", 1.8)),
    4: (LatticeStage("e8p", 1.0), LatticeStage("e8p", 3.7)),
}
"""Stages by bits per weight; a group of 8 weights takes as many bytes."""


def pack_lattice(codes: Tensor, bits: int) -> Tensor:
    """Bytes of a group: codes (S, ...) of all stages -> uint8 (..., bits), the low byte of a code first."""
    parts = []
    for stage, own in zip(LATTICE_STAGES[bits], codes, strict=True):
        parts += [own >> (8 * byte) & 0xFF for byte in range(stage.num_bytes)]
    return torch.stack(parts, dim=-1).to(torch.uint8)


def unpack_lattice(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_lattice`: uint8 (..., bits) -> codes (S, ...), int64. Every byte belongs to a point."""
    codes, first = [], 0
    for stage in LATTICE_STAGES[bits]:
        own = [packed[..., first + byte].to(torch.int64) << (8 * byte) for byte in range(stage.num_bytes)]
        codes.append(own[0] if len(own) == 1 else own[0] | own[1])
        first += stage.num_bytes
    return torch.stack(codes)
