"""Encoding one group of weights as a sum of codebook entries: beam search in the metric of the group.

AQLM searches with a beam over all groups of a row (arXiv 2401.06118, phase 1); here the beam lives inside one group.

Letters: O out (rows, encoded at once), G groups a row, K codebooks, C entries a codebook, D group length, B beam width.
"""

from typing import NamedTuple

from torch import Tensor

from casp_pl.kernels.beam_search import beam_search

__all__ = ["GroupTables", "beam_codes", "group_tables"]


class GroupTables(NamedTuple):
    """Codebooks (K, C, D), and by group their norms (G, K, C) and transposed images (G, K, D, C) in its metric."""

    codebooks: Tensor
    norms: Tensor
    images: Tensor


def group_tables(codebooks: Tensor, metrics: Tensor) -> GroupTables:
    """Tabulate codebooks (K, C, D) in the metrics (G, D, D) of the groups."""
    images = codebooks @ metrics[:, None]
    norms = (images * codebooks).sum(dim=3)
    return GroupTables(codebooks, norms, images.transpose(2, 3).contiguous())


def beam_codes(linear: Tensor, tables: GroupTables, group: int, width: int) -> tuple[Tensor, Tensor]:
    """Codes (K, O) int64 of one group in all rows for linear = M x (D, O), and their scores (O,); see `beam_search`."""
    return beam_search(linear, tables.codebooks, tables.norms[group], tables.images[group], width)
