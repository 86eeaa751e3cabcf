"""Which codebooks a matrix gets: large ones where many weights share their cost, small ones for small matrices.

Letters: O out, I in, K codebooks, C entries a codebook, D group length.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from casp_pl.errors import ConfigError

__all__ = ["DEFAULT_FORMATS", "AdditiveFormat", "choose_format", "parse_formats"]


class AdditiveFormat(NamedTuple):
    """K codebooks of C entries of length D: codes cost K log2(C) / D bits a weight."""

    num_codebooks: int
    entries: int
    group_length: int

    @property
    def table_bits(self) -> int:
        """What the codebooks cost in float16."""
        return 16 * self.num_codebooks * self.entries * self.group_length


# Bits a weight -> formats from the largest codebooks to the smallest. Chosen by `python -m benchmarks.small_matrices`.
DEFAULT_FORMATS: dict[int, tuple[AdditiveFormat, ...]] = {
    bits: tuple(AdditiveFormat(*sizes) for sizes in ladder)
    for bits, ladder in {
        2: ((2, 256, 8), (1, 256, 4), (4, 16, 8), (2, 16, 4), (1, 16, 2), (1, 4, 1)),
        3: ((3, 256, 8), (4, 64, 8), (2, 64, 4), (3, 16, 4), (1, 64, 2), (2, 8, 2), (1, 8, 1)),
        4: ((4, 256, 8), (2, 256, 4), (4, 16, 4), (2, 16, 2), (1, 16, 1)),
    }.items()
}


def choose_format(
    formats: Iterable[AdditiveFormat], out_features: int, in_features: int, *, max_overhead: float
) -> AdditiveFormat:
    """The first format whose codebooks cost at most `max_overhead` bits a weight; if none does, the smallest.

    Args:
        formats: not empty, in the order of preference.
        out_features: O.
        in_features: I.
        max_overhead: bits a weight that the codebooks may add to the codes.
    """
    formats = tuple(formats)
    allowed = max_overhead * out_features * in_features
    smallest = min(formats, key=lambda layout: layout.table_bits)
    return next((layout for layout in formats if layout.table_bits <= allowed), smallest)


def parse_formats(formats: Mapping[int, Sequence[Sequence[int]]]) -> dict[int, tuple[AdditiveFormat, ...]]:
    """Check a user's formats {bits: [[K, C, D], ...]}.

    Raises:
        ConfigError: bits without a format or unknown; a format is not three positive integers, C is not 2, 4, 8 ...
            256, or its codes do not cost `bits`.
    """
    for bits, ladder in formats.items():
        if bits not in DEFAULT_FORMATS or not ladder:
            levels = ", ".join(map(str, DEFAULT_FORMATS))
            raise ConfigError(f"formats[{bits}]: needs at least one format, at one of the levels {levels}")
    return {bits: tuple(_parse(sizes, bits) for sizes in ladder) for bits, ladder in formats.items()}


def _parse(sizes: Sequence[int], bits: int) -> AdditiveFormat:
    if len(sizes) != 3 or min(sizes) < 1:
        raise ConfigError(f"a format is [codebooks, entries, group length], not {list(sizes)}")
    layout = AdditiveFormat(*sizes)
    if layout.entries not in (2, 4, 8, 16, 32, 64, 128, 256):
        raise ConfigError(f"format {list(sizes)}: a codebook has 2, 4, 8 ... 256 entries, not {layout.entries}")
    code_bits = layout.num_codebooks * (layout.entries.bit_length() - 1)
    if code_bits != bits * layout.group_length:
        raise ConfigError(f"format {list(sizes)} costs {code_bits / layout.group_length:g} bits a weight, not {bits}")
    return layout
