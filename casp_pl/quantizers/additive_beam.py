"""Encoding one group of weights as a sum of codebook entries: beam search in the metric of the group.

AQLM searches with a beam over all groups of a row (arXiv 2401.06118, phase 1); here the beam lives inside one group.

Letters: O out (rows, encoded at once), G groups a row, K codebooks, C entries a codebook, D group length, B beam width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from casp_pl.kernels.beam_search import beam_search

__all__ = ["GroupTables", "beam_codes", "group_tables", "improved_codes", "sum_of_entries"]


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


def sum_of_entries(codebooks: Tensor, codes: Tensor) -> Tensor:
    """Sum over k of the entries codes (K, O) of codebooks (K, C, D) -> (D, O)."""
    value = codebooks[0].index_select(0, codes[0])
    for codebook, chosen in zip(codebooks[1:], codes[1:], strict=True):
        value = value + codebook.index_select(0, chosen)
    return value.T


def beam_codes(linear: Tensor, tables: GroupTables, group: int, width: int) -> tuple[Tensor, Tensor]:
    """Codes (K, O) int64 of one group in all rows for linear = M x (D, O), and their scores (O,); see `beam_search`."""
    return beam_search(linear, tables.codebooks, tables.norms[group], tables.images[group], width)


def improved_codes(rest: Tensor, tables: GroupTables, group: int, codes: Tensor, width: int) -> Tensor:
    """The better of the given codes and those of a fresh beam search, row by row.

    Args:
        rest: M (x - sum of the entries of `codes`) (D, O).
        tables: of all groups.
        group: which one.
        codes: (K, O), as they are.
        width: B.
    """
    image = torch.stack([tables.images[group, k].index_select(1, chosen) for k, chosen in enumerate(codes)]).sum(dim=0)
    score = -(sum_of_entries(tables.codebooks, codes) * (image + 2 * rest)).sum(dim=0)
    found, found_score = beam_codes(rest + image, tables, group, width)
    return torch.where(found_score < score, found, codes)
