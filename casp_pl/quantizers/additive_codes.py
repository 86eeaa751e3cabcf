"""The codes of an additive quantizer: first by error feedback, then improved by coordinate descent on the layer's output error.

Letters: O out, I in, G groups a row, K codebooks, C entries a codebook, D group length, S groups of one span. I = G D.
Weights are transposed here, (I, O): then the values of a group of all rows are contiguous and every product is one GEMM.

The error of a group is quadratic. In the metric M_g (D, D), x unscaled, sum over its K entries: |x - sum_k c_k|_M^2. Entry k, the others
fixed, is argmin_c c^T M c - 2 c^T M (x - sum of the others): a nearest neighbour, with M c ("images") and c^T M c ("norms") tabulated.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from casp_pl.kernels.nearest import nearest_entries

__all__ = ["GroupTables", "conditional_metrics", "feedback_codes", "group_tables", "sweep_codes"]

_SPAN = 16  # groups whose gradient one GEMM brings up to date; inside a span it is kept by rank-D updates


class GroupTables(NamedTuple):
    """Codebooks (K, C, D) with, for every group's metric, their norms (G, K, C) and transposed images M c (G, K, D, C)."""

    codebooks: Tensor
    norms: Tensor
    images: Tensor


def group_tables(codebooks: Tensor, metrics: Tensor) -> GroupTables:
    """Tabulate codebooks (K, C, D) in the metrics (G, D, D) of the groups."""
    images = codebooks @ metrics[:, None]
    norms = (images * codebooks).sum(dim=3)
    return GroupTables(codebooks, norms, images.transpose(2, 3).contiguous())


def conditional_metrics(factor: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Block LDL^T of H = C C^T: what an error in a group costs once all groups to its left may still correct it.

    Args:
        factor: (I, I), the lower Cholesky factor C.
        length: D, which divides I.

    Returns:
        metrics (G, D, D), D_g = C_gg C_gg^T, and lower (I, I), L = C diag(C_gg)^-1, its unit block lower factor.
        Source: LDLQ, QuIP (arXiv 2307.13304); blocks as in QuIP# (arXiv 2402.04396).
    """
    groups = factor.shape[0] // length
    blocks = torch.stack([factor[g : g + length, g : g + length] for g in range(0, groups * length, length)])
    columns = factor.view(-1, groups, length).transpose(0, 1)
    lower = torch.linalg.solve_triangular(blocks, columns, upper=False, left=False)
    return blocks @ blocks.mT, lower.transpose(0, 1).reshape(factor.shape)


def _descend(rest: Tensor, tables: GroupTables, group: int, codes: Tensor, passes: int) -> Tensor:
    """Coordinate passes over the K entries of one group, in place in codes (K, O). rest (D, O) = M (x - sum of all entries)."""
    for _ in range(passes):
        for codebook, norms, images, chosen in zip(
            tables.codebooks, tables.norms[group], tables.images[group], codes, strict=True
        ):
            own = rest + images.index_select(1, chosen)
            chosen.copy_(nearest_entries(own, codebook, norms))
            rest = own - images.index_select(1, chosen)
    return rest


def _greedy(linear: Tensor, tables: GroupTables, group: int, codes: Tensor) -> Tensor:
    """First entries of one group, one codebook after the other, into codes (K, O). Returns what is left of linear (D, O) = M x."""
    for codebook, norms, images, chosen in zip(
        tables.codebooks, tables.norms[group], tables.images[group], codes, strict=True
    ):
        chosen.copy_(nearest_entries(linear, codebook, norms))
        linear = linear - images.index_select(1, chosen)
    return linear


def _value(codebooks: Tensor, codes: Tensor) -> Tensor:
    """Unscaled values of one group: codebooks (K, C, D), codes (K, O) -> (D, O)."""
    value = codebooks[0].index_select(0, codes[0])
    for codebook, chosen in zip(codebooks[1:], codes[1:], strict=True):
        value = value + codebook.index_select(0, chosen)
    return value.T


def feedback_codes(
    weight: Tensor, metrics: Tensor, lower: Tensor, codebooks: Tensor, scales: Tensor, *, passes: int, span: int = _SPAN
) -> Tensor:
    """Codes by error feedback: groups from right to left, each aiming at W_g + (W - W_hat)_{>g} L_{>g,g} in its conditional metric.

    Args:
        weight: (O, I).
        metrics, lower: of `conditional_metrics`.
        codebooks: (K, C, D).
        scales: (O, 1), not zero.
        passes: coordinate passes over the K entries after the greedy choice.
        span: groups whose feedback from outside the span comes by one GEMM.

    Returns:
        codes (G, K, O) int64.
    """
    length, groups = codebooks.shape[2], metrics.shape[0]
    tables, row = group_tables(codebooks, metrics), scales.T
    target = weight.T.contiguous()  # gathers the feedback
    error = torch.zeros_like(target)
    codes = torch.empty(groups, codebooks.shape[0], weight.shape[0], dtype=torch.int64, device=weight.device)
    for stop in range(groups, 0, -span):
        start = max(0, stop - span)
        inner, outer = slice(start * length, stop * length), slice(stop * length, None)
        target[inner] += lower[outer, inner].T @ error[outer]
        for g in reversed(range(start, stop)):
            here, left = slice(g * length, (g + 1) * length), slice(start * length, g * length)
            rest = _greedy(metrics[g] @ (target[here] / row), tables, g, codes[g])
            _descend(rest, tables, g, codes[g], passes)
            error[here] = weight.T[here] - _value(codebooks, codes[g]) * row
            target[left] += lower[here, left].T @ error[here]
    return codes


def sweep_codes(
    error: Tensor, moment: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, order: Tensor, *, passes: int = 1, span: int = _SPAN
) -> None:
    """One pass of coordinate descent over all codes, in place: no entry can be exchanged alone for the better when its group is left.

    Args:
        error: (I, O), (W - W_hat)^T; brought up to date in place.
        moment: (I, I), H.
        codes: (G, K, O) int64, changed in place.
        codebooks: (K, C, D).
        scales: (O, 1); rows of scale 0 cannot be improved and keep their codes' zero contribution.
        order: (G,), the order in which the groups are visited.
        passes: coordinate passes over the K entries at each visit.
        span: groups whose gradient one GEMM computes.
    """
    length, groups = codebooks.shape[2], len(codes)
    metrics = torch.stack([moment[g : g + length, g : g + length] for g in range(0, groups * length, length)])
    tables, row = group_tables(codebooks, metrics), scales.T
    inverse = torch.where(row == 0, 0, 1 / row)
    within = torch.arange(length, device=moment.device)
    for visited in order.split(span):
        columns = (visited[:, None] * length + within).flatten()
        gradient, local = moment[columns] @ error, moment[columns][:, columns]
        for position, g in enumerate(visited.tolist()):
            here, rows = slice(position * length, (position + 1) * length), slice(g * length, (g + 1) * length)
            before = _value(codebooks, codes[g])
            _descend(gradient[here] * inverse, tables, g, codes[g], passes)
            change = (_value(codebooks, codes[g]) - before) * row
            gradient -= local[:, here] @ change
            error[rows] -= change
