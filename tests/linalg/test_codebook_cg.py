"""Conjugate gradients on codebooks against a dense solve of the same normal equations."""

import torch
from torch import Tensor

from casp_pl.kernels.additive import AdditiveIndex, dequantize_additive_reference
from casp_pl.linalg.codebook_cg import conjugate_gradients, fit_codebooks

O, G, K, C, D = 7, 3, 2, 4, 3  # noqa: E741


def _problem() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root = draw(G * D, 4 * G * D)
    codes = torch.randint(0, C, (O, G, K), generator=generator)
    return draw(O, G * D), root @ root.T, codes, draw(K, C, D), draw(O, 1).abs() + 0.5


def _loss(weight: Tensor, moment: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> float:
    error = weight - dequantize_additive_reference(codes, codebooks, scales)
    return float(((error @ moment) * error).sum())


def test_conjugate_gradients_solve_a_dense_system_in_as_many_steps_as_unknowns() -> None:
    root = torch.randn(6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix = root @ root.T
    b = torch.arange(6.0, dtype=torch.float64)
    x = conjugate_gradients(lambda v: matrix @ v, b, matrix.diagonal(), iterations=6)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-8)


def test_conjugate_gradients_stop_at_a_zero_residual() -> None:
    zero = torch.zeros(3)
    assert torch.equal(conjugate_gradients(lambda v: v, zero, torch.ones(3), iterations=5), zero)


def _fit(problem: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], iterations: int) -> Tensor:
    weight, moment, codes, codebooks, scales = problem
    given = (weight @ moment, moment, AdditiveIndex(codes, C), scales, codebooks)
    return fit_codebooks(*given, iterations=iterations)


def test_codebooks_reach_the_dense_least_squares_loss() -> None:
    weight, moment, codes, _, scales = problem = _problem()
    fitted = _fit(problem, 60)

    # column j of the design matrix: what the weight gains from unknown j, where the moment is the identity
    root = torch.linalg.cholesky(moment)
    basis = torch.eye(K * C * D, dtype=torch.float64).view(-1, K, C, D)
    design = torch.stack([(dequantize_additive_reference(codes, e, scales) @ root).flatten() for e in basis], dim=1)
    solution = torch.linalg.lstsq(design, (weight @ root).flatten(), driver="gelsd").solution
    expected = _loss(weight, moment, codes, solution.view(K, C, D), scales)
    assert abs(_loss(weight, moment, codes, fitted, scales) / expected - 1) < 1e-6


def test_every_step_lowers_the_loss() -> None:
    weight, moment, codes, _, scales = problem = _problem()
    losses = [_loss(weight, moment, codes, _fit(problem, iterations), scales) for iterations in range(6)]
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False))
