"""Lazy error feedback and lazy sweeps against loops without any laziness, the beam against all combinations."""

import itertools

import pytest
import torch
from torch import Tensor

from casp_pl.kernels.beam_search import improve_codes, sum_of_entries
from casp_pl.quantizers.additive_beam import beam_codes, group_tables
from casp_pl.quantizers.additive_codes import conditional_metrics, diagonal_blocks, feedback_codes, sweep_codes

O, G, K, C, D = 9, 5, 2, 8, 3  # noqa: E741
I = G * D  # noqa: E741


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root = draw(I, 2 * I) + 2 * draw(I, 1)
    scales = draw(O, 1).abs() + 0.2
    return draw(O, I) * scales, root @ root.T / I, draw(K, C, D) / K**0.5, scales


def _group(matrix: Tensor, g: int) -> Tensor:
    return matrix[:, g * D : (g + 1) * D]


def _loss(error: Tensor, moment: Tensor) -> float:
    return float(((error @ moment) * error).sum())


def _all_sums(codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Every combination of entries (C^K, K) and its sum (C^K, D)."""
    combinations = torch.tensor(list(itertools.product(range(C), repeat=K)))
    return combinations, sum(codebooks[k][combinations[:, k]] for k in range(K))


def test_a_beam_as_wide_as_the_codebook_finds_the_best_of_all_combinations(problem) -> None:
    weight, moment, codebooks, _ = problem
    metrics = diagonal_blocks(moment, D)
    tables = group_tables(codebooks, metrics)
    for g in (0, G - 1):
        x = _group(weight, g)
        codes, scores = beam_codes(metrics[g] @ x.T, tables, g, C)
        combinations, sums = _all_sums(codebooks)
        errors = x[:, None] - sums
        costs = torch.einsum("ond,de,one->on", errors, metrics[g], errors)
        assert torch.equal(codes.T, combinations[costs.argmin(dim=1)])
        own = torch.einsum("od,de,oe->o", x, metrics[g], x)
        torch.testing.assert_close(scores + own, costs.amin(dim=1))


@pytest.mark.parametrize("codebooks_count", [1, 3])
def test_wider_beams_are_better_and_one_codebook_needs_none(codebooks_count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    codebooks = torch.randn(codebooks_count, 16, D, generator=generator)
    tables = group_tables(codebooks, torch.eye(D)[None])
    x = torch.randn(D, 200, generator=generator)
    costs = []
    for width in (1, 4, 16):
        codes, scores = beam_codes(x, tables, 0, width)
        cost = (x - sum_of_entries(codebooks, codes)).square().sum(dim=0)
        torch.testing.assert_close(cost, scores + x.square().sum(dim=0), rtol=1e-4, atol=1e-4)
        costs.append(float(cost.sum()))
    if codebooks_count == 1:
        assert costs[0] == costs[1] == costs[2]
    else:
        assert costs[0] > costs[1] > costs[2]


def test_good_codes_are_kept(problem) -> None:
    weight, moment, codebooks, _ = problem
    metrics = diagonal_blocks(moment, D)
    tables, x = group_tables(codebooks, metrics), _group(weight, 2).T
    best, _ = beam_codes(metrics[2] @ x, tables, 2, C)
    gradient, kept, fall = metrics[2] @ (x - sum_of_entries(codebooks, best)), best.clone(), torch.zeros(O).double()
    given = (gradient, torch.ones(O).double(), codebooks, tables.norms[2], tables.images[2])
    assert torch.equal(improve_codes(*given, 1, kept, fall), torch.zeros(D, O).double())
    assert torch.equal(kept, best)
    assert torch.equal(fall, torch.zeros(O).double())


def test_conditional_metric_is_the_cost_after_the_groups_to_the_left_have_answered(problem) -> None:
    """D_g is the Schur complement of H's blocks left of g; L is unit block lower and L diag(D) L^T is H."""
    _, moment, _, _ = problem
    metrics, lower = conditional_metrics(torch.linalg.cholesky(moment), D)
    torch.testing.assert_close(lower @ torch.block_diag(*metrics) @ lower.T, moment)
    torch.testing.assert_close(diagonal_blocks(lower, D), torch.eye(D, dtype=torch.float64).expand(G, D, D))
    here, left = slice(3 * D, 4 * D), slice(0, 3 * D)
    answered = moment[here, left] @ torch.linalg.solve(moment[left, left], moment[left, here])
    torch.testing.assert_close(metrics[3], moment[here, here] - answered)


@pytest.mark.parametrize("span", [1, 2, 16])
def test_lazy_feedback_equals_a_plain_loop(problem, span: int) -> None:
    weight, moment, codebooks, scales = problem
    metrics, lower = conditional_metrics(torch.linalg.cholesky(moment), D)
    codes = feedback_codes(weight, metrics, lower, codebooks, scales, beam=C, span=span)

    combinations, sums = _all_sums(codebooks)
    approx = torch.zeros_like(weight)
    for g in reversed(range(G)):
        here, after = slice(g * D, (g + 1) * D), slice((g + 1) * D, I)
        target = (weight[:, here] + (weight - approx)[:, after] @ lower[after, here]) / scales
        errors = target[:, None] - sums
        best = torch.einsum("ond,de,one->on", errors, metrics[g], errors).argmin(dim=1)
        approx[:, here] = sums[best] * scales
        assert torch.equal(codes[g].T, combinations[best])


@pytest.mark.parametrize("span", [1, 2, 16])
def test_lazy_sweep_equals_an_eager_one_and_never_raises_the_loss(problem, span: int) -> None:
    weight, moment, codebooks, scales = problem
    generator = torch.Generator().manual_seed(2)
    start = torch.randint(0, C, (G, K, O), generator=generator)
    order = torch.randperm(G, generator=generator)

    def decoded(codes: Tensor) -> Tensor:
        return torch.cat([sum_of_entries(codebooks, own).T for own in codes], dim=1) * scales

    def row_losses(codes: Tensor) -> Tensor:
        rows = weight - decoded(codes)
        return ((rows @ moment) * rows).sum(dim=1)

    lazy, error = start.clone(), (weight - decoded(start)).T.contiguous()
    fall = sweep_codes(error, moment, lazy, codebooks, scales, order, beam=C, span=span)

    eager, combinations, before = start.clone(), *_all_sums(codebooks)[:1], _loss(weight - decoded(start), moment)
    for g in order.tolist():
        losses = []
        for combination in combinations:  # every value of one group, the loss of every row computed from scratch
            trial = eager.clone()
            trial[g] = combination[:, None]
            losses.append(row_losses(trial))
        eager[g] = combinations[torch.stack(losses).argmin(dim=0)].T
        after = _loss(weight - decoded(eager), moment)
        assert after <= before * (1 + 1e-12)
        before = after
    assert torch.equal(lazy, eager)
    torch.testing.assert_close(error.T, weight - decoded(lazy))
    torch.testing.assert_close(fall, row_losses(start) - row_losses(lazy))


def test_a_row_of_scale_zero_stays_zero(problem) -> None:
    weight, moment, codebooks, scales = problem
    scales[4] = 0
    codes = torch.zeros(G, K, O, dtype=torch.int64)
    decoded = torch.cat([sum_of_entries(codebooks, own).T for own in codes], dim=1) * scales
    error = (weight - decoded).T.contiguous()
    sweep_codes(error, moment, codes, codebooks, scales, torch.arange(G), beam=4)
    assert error.isfinite().all()
    torch.testing.assert_close(error.T[4], weight[4])
