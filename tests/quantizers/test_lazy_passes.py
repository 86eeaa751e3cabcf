"""Both lazy passes against loops that correct everything at once."""

import pytest
import torch
from torch import Tensor

from casp_pl.quantizers.additive_codes import conditional_metrics
from casp_pl.quantizers.lazy_passes import feedback_pass, sweep_pass

O, G, D = 7, 6, 2  # noqa: E741
I = G * D  # noqa: E741


@pytest.fixture
def problem() -> tuple[Tensor, Tensor]:
    """W^T (I, O) and H (I, I)."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(I, 2 * I, generator=generator, dtype=torch.float64)
    return 3 * torch.randn(I, O, generator=generator, dtype=torch.float64), root @ root.T / I


@pytest.mark.parametrize("span", [1, 2, 4, 16])
def test_feedback_aims_at_the_target_of_ldlq(problem: tuple[Tensor, Tensor], span: int) -> None:
    weight, moment = problem
    _, lower = conditional_metrics(torch.linalg.cholesky(moment), D)
    approx = torch.zeros_like(weight)
    for g in reversed(range(G)):
        here, after = slice(g * D, (g + 1) * D), slice((g + 1) * D, I)
        approx[here] = (weight[here] + lower[after, here].T @ (weight - approx)[after]).round()
    error = feedback_pass(weight, lower, D, lambda _, target: target.round(), span=span)
    torch.testing.assert_close(weight - error, approx)


@pytest.mark.parametrize("span", [1, 2, 4, 16])
def test_a_sweep_sees_the_gradient_of_everything_done_before(problem: tuple[Tensor, Tensor], span: int) -> None:
    weight, moment = problem
    order = torch.randperm(G, generator=torch.Generator().manual_seed(1))
    error, expected, seen = weight.clone(), weight.clone(), []
    sweep_pass(error, moment, D, order, lambda g, gradient: seen.append(g) or gradient.round() / 8, span=span)
    for g in order.tolist():
        here = slice(g * D, (g + 1) * D)
        expected[here] -= (moment[here] @ expected).round() / 8
    torch.testing.assert_close(error, expected)
    assert seen == order.tolist()
