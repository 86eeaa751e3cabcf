"""What a compressed linear costs: its codes alone, and everything that is stored for it.

Legend: O out_features, I in_features, R rank. A low-rank product counts both factors, (R, I) and (O, R).
"""

from dataclasses import dataclass
from typing import Protocol

__all__ = ["BitCosts", "ModuleBits", "module_bits"]


class BitCosts(Protocol):
    """The part of a quantizer that the allocation needs; every `casp_pl.quantizers.Quantizer` has it."""

    @property
    def name(self) -> str:
        """Short name that plans and reports show."""

    @property
    def levels(self) -> tuple[int, ...]:
        """Bits that it can do."""

    def code_bits(self, out_features: int, in_features: int, *, bits: int) -> int:
        """Bits of the codes alone of an (O, I) weight."""

    def storage_bits(self, out_features: int, in_features: int, *, bits: int) -> int:
        """Bits of everything stored for an (O, I) weight: codes, codebooks, scales, zeros."""

    def for_module(self, name: str) -> "BitCosts":
        """What states the costs of the linear with this full name."""


@dataclass(frozen=True)
class ModuleBits:
    """Bits of one compressed linear: `codes` alone and `total`, everything counted (the bias never)."""

    codes: int
    total: int

    def __add__(self, other: "ModuleBits") -> "ModuleBits":
        return ModuleBits(self.codes + other.codes, self.total + other.total)

    def counted(self, counts: str) -> int:
        """The figure that a budget in `codes` or `total` bits looks at."""
        return self.codes if counts == "codes" else self.total


def module_bits(quantizer: BitCosts, shape: tuple[int, int], *, bits: int, rank: int | None = None) -> ModuleBits:
    """Cost of an (O, I) linear at `bits`, or of its two factors at `bits` where it has a rank."""
    out_features, in_features = shape
    parts = [shape] if rank is None else [(rank, in_features), (out_features, rank)]
    return ModuleBits(
        codes=sum(quantizer.code_bits(rows, columns, bits=bits) for rows, columns in parts),
        total=sum(quantizer.storage_bits(rows, columns, bits=bits) for rows, columns in parts),
    )
