"""Encoding one group of weights as a sum of codebook entries: beam search in the metric of the group.

|x - sum_k c_k|_M^2 is |x|_M^2 + sum_k (c_k^T M c_k - 2 <c_k, rest_k>) with rest_k = M (x - c_1 - ... - c_{k-1}). So x
is needed only as M x, and with norms c^T M c and images M c in tables a sum is extended by one small product. AQLM
searches with a beam over all groups of a row (arXiv 2401.06118, phase 1); here the beam lives inside one group.

Letters: O out (rows, encoded at once), G groups a row, K codebooks, C entries a codebook, D group length, B beam width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from casp_pl.kernels.nearest import best_of_runs, nearest_entries, nearest_scores

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
    """Beam search for the codes of one group in all rows, one codebook after the other.

    Args:
        linear: M x (D, O).
        tables: of all groups.
        group: which one.
        width: B, a power of two: partial sums that are kept for every row; 1 is greedy.

    Returns:
        codes (K, O) int64 and their scores |x - sum_k c_k|_M^2 - |x|_M^2 (O,).
    """
    rest, scores = linear[:, None], linear.new_zeros(1, linear.shape[1])  # (D, B, O), (B, O)
    codes = torch.empty(0, *scores.shape, dtype=torch.int64, device=linear.device)  # (k, B, O)
    *inner, last = tables.codebooks
    for k, codebook in enumerate(inner):
        runs = min(width, len(codebook))
        entries, gains = best_of_runs(rest.flatten(1), codebook, tables.norms[group, k], runs)
        totals = (gains.view(runs, *scores.shape) + scores).flatten(0, 1)  # (candidates, O)
        kept = _smallest(totals, width)
        parent, chosen, scores = kept % len(scores), entries.view(totals.shape).gather(0, kept), totals.gather(0, kept)
        codes = torch.cat([codes.gather(1, parent.expand(k, *parent.shape)), chosen[None]])
        image = tables.images[group, k].index_select(1, chosen.flatten()).view(-1, *chosen.shape)
        rest = rest.gather(1, parent.expand(len(rest), *parent.shape)) - image
    norms = tables.norms[group, len(inner)]
    scores, best = (nearest_scores(rest.flatten(1), last, norms).view(scores.shape) + scores).min(dim=0, keepdim=True)
    rest = rest.gather(1, best.expand(len(rest), *best.shape))[:, 0]
    codes = codes.gather(1, best.expand(len(inner), *best.shape))[:, 0]
    return torch.cat([codes, nearest_entries(rest, last, norms)[None]]), scores[0]


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


def _smallest(totals: Tensor, count: int) -> Tensor:
    """Rows of the `count` smallest of every column: (candidates, O) -> (count or fewer, O)."""
    if count >= len(totals):
        return torch.arange(len(totals), device=totals.device)[:, None].expand_as(totals)
    return totals.topk(count, dim=0, largest=False).indices
