"""The codes of an additive quantizer: first by error feedback, then improved group by group on the output error.

Both passes are lazy: corrections inside a span of S groups are made group by group, those between spans by one product
of large matrices. Weights are transposed inside, (I, O), so that a group of all rows is contiguous.

Letters: O out, I = G D in, G groups a row, K codebooks, C entries a codebook, D group length, S groups of a span.
"""

import torch
from torch import Tensor

from casp_pl.quantizers.additive_beam import beam_codes, group_tables, improved_codes, sum_of_entries

__all__ = ["conditional_metrics", "diagonal_blocks", "feedback_codes", "sweep_codes"]

_SPAN = 16


def diagonal_blocks(matrix: Tensor, length: int) -> Tensor:
    """The D x D blocks on the diagonal of a matrix (I, I) -> (G, D, D)."""
    return torch.stack([matrix[i : i + length, i : i + length] for i in range(0, len(matrix), length)])


def conditional_metrics(factor: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Block LDL^T of H = C C^T: what an error in a group costs when the groups to its left may still correct it.

    Args:
        factor: C (I, I), the lower Cholesky factor of H.
        length: D, a divisor of I.

    Returns:
        metrics (G, D, D), C_gg C_gg^T, and lower (I, I), L = C diag(C_gg)^-1, whose blocks carry the feedback.
        Source: LDLQ of QuIP (arXiv 2307.13304), in blocks as in QuIP# (arXiv 2402.04396).
    """
    blocks = diagonal_blocks(factor, length)
    columns = factor.view(len(factor), -1, length).transpose(0, 1)
    lower = torch.linalg.solve_triangular(blocks, columns, upper=False, left=False)
    return blocks @ blocks.mT, lower.transpose(0, 1).reshape(factor.shape)


def feedback_codes(
    weight: Tensor, metrics: Tensor, lower: Tensor, codebooks: Tensor, scales: Tensor, *, beam: int, span: int = _SPAN
) -> Tensor:
    """Codes by error feedback: from right to left, group g aims at W_g + (W - W_hat)_{>g} L_{>g,g} in its own metric.

    Args:
        weight: W (O, I).
        metrics: of `conditional_metrics` (G, D, D).
        lower: of `conditional_metrics` (I, I).
        codebooks: (K, C, D).
        scales: (O, 1), none of them 0.
        beam: width of the search in a group.
        span: S.

    Returns:
        codes (G, K, O) int64.
    """
    length, groups = codebooks.shape[2], len(metrics)
    tables, scales = group_tables(codebooks, metrics), scales.T
    target = weight.T.contiguous()  # W^T plus the feedback so far
    error = torch.zeros_like(target)
    codes = torch.empty(groups, len(codebooks), len(weight), dtype=torch.int64, device=weight.device)
    for stop in range(groups, 0, -span):
        start = max(0, stop - span)
        inside, done = slice(start * length, stop * length), slice(stop * length, None)
        target[inside] += lower[done, inside].T @ error[done]
        for g in reversed(range(start, stop)):
            here, before = slice(g * length, (g + 1) * length), slice(start * length, g * length)
            codes[g], _ = beam_codes(metrics[g] @ (target[here] / scales), tables, g, beam)
            error[here] = weight.T[here] - sum_of_entries(codebooks, codes[g]) * scales
            target[before] += lower[here, before].T @ error[here]
    return codes


def sweep_codes(
    error: Tensor,
    moment: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    order: Tensor,
    *,
    beam: int,
    span: int = _SPAN,
) -> None:
    """One pass over all groups, in place: each takes better codes if a search finds them. The loss never rises.

    Args:
        error: (W - W_hat)^T (I, O), brought up to date in place.
        moment: H (I, I).
        codes: (G, K, O) int64, changed in place.
        codebooks: (K, C, D).
        scales: (O, 1); in a row of scale 0 codes mean nothing and may change.
        order: of the groups (G,).
        beam: width of the search in a group.
        span: S.
    """
    length = codebooks.shape[2]
    tables, scales = group_tables(codebooks, diagonal_blocks(moment, length)), scales.T
    inverse = torch.where(scales == 0, 0, 1 / scales)
    within = torch.arange(length, device=moment.device)
    for visited in torch.split(order, span):
        columns = (visited[:, None] * length + within).flatten()
        gradient, local = moment[columns] @ error, moment[columns][:, columns]
        for position, g in enumerate(visited.tolist()):
            block, here = (slice(start * length, (start + 1) * length) for start in (position, g))
            better = improved_codes(gradient[block] * inverse, tables, g, codes[g], beam)
            change = (sum_of_entries(codebooks, better) - sum_of_entries(codebooks, codes[g])) * scales
            codes[g] = better
            gradient -= local[:, block] @ change
            error[here] -= change
