"""The safe Cholesky on good, singular, indefinite and broken matrices."""

import logging

import pytest
import torch

from casp_pl.errors import NumericsError
from casp_pl.linalg.cholesky import safe_cholesky, solve_factored


def _second_moment(size: int, tokens: int) -> torch.Tensor:
    inputs = torch.randn(tokens, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    return inputs.T @ inputs


def test_a_good_matrix_is_not_touched(caplog: pytest.LogCaptureFixture) -> None:
    moment = _second_moment(7, 50)
    factor, jitter = safe_cholesky(moment, 0.0)
    assert jitter == 0.0
    assert factor.dtype == torch.float64
    torch.testing.assert_close(factor @ factor.T, moment)
    assert not caplog.records


def test_damping_is_relative_to_the_diagonal_and_reported_absolutely() -> None:
    moment = 1e-6 * _second_moment(7, 50).float()
    factor, jitter = safe_cholesky(moment, 0.01)
    assert jitter == pytest.approx(0.01 * moment.diagonal().mean().item())
    torch.testing.assert_close(factor @ factor.T, moment.double() + jitter * torch.eye(7, dtype=torch.float64))


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(5, 5),
        torch.ones(5, 5),
        torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0])),
        torch.diag(torch.tensor([1.0, -0.5, 1.0])),
        -torch.eye(3),
        _second_moment(9, 4),
    ],
    ids=["zero", "rank one", "dead column", "indefinite", "negative", "fewer tokens than columns"],
)
def test_jitter_grows_until_it_works_and_is_logged(matrix: torch.Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        factor, jitter = safe_cholesky(matrix, 0.0)
    assert factor.isfinite().all()
    assert jitter > 0
    expected = matrix.double() + jitter * torch.eye(len(matrix), dtype=torch.float64)
    torch.testing.assert_close(factor @ factor.T, expected)
    assert "needed damping" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_told_from_not_definite(value: float) -> None:
    matrix = torch.eye(4)
    matrix[2, 1] = value
    with pytest.raises(NumericsError, match="holds 1 values that are NaN"):
        safe_cholesky(matrix, 0.01)


def test_a_factor_solves() -> None:
    moment, right = _second_moment(7, 50), torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(solve_factored(right, safe_cholesky(moment)[0]), torch.linalg.solve(moment, right))


def test_what_no_jitter_can_mend_is_an_error() -> None:
    matrix = torch.tensor([[0.0, 1e9], [1e9, 1e-9]])
    with pytest.raises(NumericsError, match="far from positive definite"):
        safe_cholesky(matrix, 0.01)
