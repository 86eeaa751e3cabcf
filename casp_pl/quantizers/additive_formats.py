"""Which codebooks a matrix gets: large ones where their cost is spread over many weights, small ones for small matrices.

Letters: O out, I in, K codebooks, C entries a codebook, D group length.
"""

from typing import NamedTuple

__all__ = ["AdditiveFormat", "LEVELS", "MAX_GROUP_LENGTH", "choose_format"]


class AdditiveFormat(NamedTuple):
    """K codebooks of C entries of length D: codes cost K log2(C) / D bits a weight."""

    num_codebooks: int
    entries: int
    group_length: int

    def table_bits(self) -> int:
        """What the codebooks cost, in float16."""
        return 16 * self.num_codebooks * self.entries * self.group_length


# By bits a weight, best quality first; every step down makes the codebooks at least twice smaller. Figures: docs/small_matrices.md.
_LADDERS: dict[int, tuple[AdditiveFormat, ...]] = {
    2: (AdditiveFormat(2, 256, 8), AdditiveFormat(1, 256, 4), AdditiveFormat(2, 16, 4), AdditiveFormat(1, 16, 2)),
    3: (
        AdditiveFormat(3, 256, 8),
        AdditiveFormat(4, 64, 8),
        AdditiveFormat(2, 64, 4),
        AdditiveFormat(3, 16, 4),
        AdditiveFormat(2, 8, 2),
    ),
    4: (AdditiveFormat(4, 256, 8), AdditiveFormat(2, 256, 4), AdditiveFormat(4, 16, 4), AdditiveFormat(2, 16, 2)),
}

LEVELS: tuple[int, ...] = tuple(_LADDERS)
MAX_GROUP_LENGTH = max(choice.group_length for ladder in _LADDERS.values() for choice in ladder)


def choose_format(out_features: int, in_features: int, *, bits: int, max_overhead: float) -> AdditiveFormat:
    """The first format of the ladder whose codebooks cost at most `max_overhead` bits a weight, or the smallest of all.

    Args:
        out_features: O.
        in_features: I.
        bits: bits a weight of the codes, one of LEVELS.
        max_overhead: bits a weight that the codebooks may add.
    """
    ladder = _LADDERS[bits]
    allowed = max_overhead * out_features * in_features
    return next((choice for choice in ladder if choice.table_bits() <= allowed), ladder[-1])
