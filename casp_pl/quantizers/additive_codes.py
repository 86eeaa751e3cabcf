"""The codes of an additive quantizer: first by error feedback, then improved group by group on the output error.

Letters: O out, I = G D in, G groups a row, K codebooks, C entries a codebook, D group length, S groups of a span.
"""

import torch
from torch import Tensor

from casp_pl.kernels.beam_search import improve_codes, sum_of_entries
from casp_pl.quantizers.additive_beam import beam_codes, group_tables
from casp_pl.quantizers.lazy_passes import SPAN, feedback_pass, sweep_pass

__all__ = ["conditional_metrics", "diagonal_blocks", "feedback_codes", "sweep_codes"]

_GROUPS = 16  # whose columns are solved for at once, in memory of their own


def diagonal_blocks(matrix: Tensor, length: int) -> Tensor:
    """The D x D blocks on the diagonal of a matrix (I, I) -> (G, D, D)."""
    return torch.stack([matrix[i : i + length, i : i + length] for i in range(0, len(matrix), length)])


def conditional_metrics(factor: Tensor, length: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Block LDL^T of H = C C^T: what an error in a group costs when the groups to its left may still correct it.

    Args:
        factor: C (I, I), the lower Cholesky factor of H.
        length: D, a divisor of I.
        dtype: of lower; None is that of C, in which everything is computed.

    Returns:
        metrics (G, D, D), C_gg C_gg^T, and lower (I, I), L = C diag(C_gg)^-1, whose blocks carry the feedback.
        Source: LDLQ of QuIP (arXiv 2307.13304), in blocks as in QuIP# (arXiv 2402.04396).
    """
    blocks = diagonal_blocks(factor, length)
    columns = factor.view(len(factor), -1, length).transpose(0, 1)
    lower = torch.empty(factor.shape, dtype=dtype or factor.dtype, device=factor.device)
    into = lower.view(len(factor), -1, length)
    for start in range(0, len(blocks), _GROUPS):
        own = slice(start, start + _GROUPS)
        solved = torch.linalg.solve_triangular(blocks[own], columns[own], upper=False, left=False)
        into[:, own] = solved.transpose(0, 1)
    return blocks @ blocks.mT, lower


def feedback_codes(
    weight: Tensor, metrics: Tensor, lower: Tensor, codebooks: Tensor, scales: Tensor, *, beam: int, span: int = SPAN
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
    tables, scales = group_tables(codebooks, metrics), scales.T
    codes = torch.empty(len(metrics), len(codebooks), len(weight), dtype=torch.int64, device=weight.device)

    def encode(g: int, target: Tensor) -> Tensor:
        codes[g], _ = beam_codes(metrics[g] @ (target / scales), tables, g, beam)
        return sum_of_entries(codebooks, codes[g]) * scales

    feedback_pass(weight.T.contiguous(), lower, codebooks.shape[2], encode, span=span)
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
    span: int = SPAN,
) -> Tensor:
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

    Returns:
        By how much the loss of every row, (W - W_hat) H (W - W_hat)^T, has fallen (O,).
    """
    length = codebooks.shape[2]
    tables = group_tables(codebooks, diagonal_blocks(moment, length))
    fall = error.new_zeros(error.shape[1])

    def improve(g: int, gradient: Tensor) -> Tensor:
        given = (gradient, scales[:, 0], codebooks, tables.norms[g], tables.images[g])
        return improve_codes(*given, beam, codes[g], fall)

    sweep_pass(error, moment, length, order, improve, span=span)
    return fall
