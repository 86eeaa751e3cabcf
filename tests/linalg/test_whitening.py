"""Whitened low rank against the outputs on real inputs, projections and plain SVD."""

import pytest
import torch
from torch import Tensor

from casp_pl.errors import NumericsError
from casp_pl.linalg.losses import proxy_loss
from casp_pl.linalg.whitening import low_rank_factors, whitened_spectrum, whitened_svd

SHAPES = [(9, 13), (13, 9), (3, 12), (12, 12)]  # tall, wide, the W_k of grouped-query attention, square


def _problem(rows: int, columns: int, tokens: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (O, I), inputs (N, I) with correlated columns of very different size, second moment (I, I)."""
    generator = torch.Generator().manual_seed(100 * rows + columns)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = inputs * torch.logspace(-2, 1, columns, dtype=torch.float64)
    return weight, inputs, inputs.T @ inputs


@pytest.mark.parametrize("shape", SHAPES)
def test_error_of_the_outputs_is_the_tail_energy(shape: tuple[int, int]) -> None:
    weight, inputs, moment = _problem(*shape)
    svd = whitened_svd(weight, moment, damping=0.0)
    energies = torch.linalg.svdvals(weight @ torch.linalg.cholesky(moment)).square()
    for values in (svd.S, whitened_spectrum(weight, moment, damping=0.0)):
        torch.testing.assert_close(values.square(), energies, rtol=0.0, atol=1e-14 * float(energies[0]))
    for rank in range(1, min(shape)):
        outer, inner = low_rank_factors(weight, svd, rank)
        assert outer.shape == (shape[0], rank)
        assert inner.shape == (rank, shape[1])
        error = (inputs @ (weight - outer @ inner).T).square().sum()
        torch.testing.assert_close(error, svd.S[rank:].square().sum(), rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_plain_svd_and_random_changes(shape: tuple[int, int]) -> None:
    weight, _, moment = _problem(*shape)
    outer, inner = low_rank_factors(weight, whitened_svd(weight, moment, damping=0.0), 2)
    best = proxy_loss(weight, outer @ inner, moment)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    assert best < proxy_loss(weight, (left[:, :2] * values[:2]) @ right[:2], moment)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = outer + 1e-3 * torch.randn(outer.shape, generator=generator, dtype=torch.float64)
        assert best <= proxy_loss(weight, other @ inner, moment)


@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_the_projection_of_the_weight(shape: tuple[int, int]) -> None:
    weight, _, moment = _problem(*shape)
    svd = whitened_svd(weight, moment)
    outer, inner = low_rank_factors(weight, svd, 2)
    torch.testing.assert_close(outer @ inner, svd.U[:, :2] @ svd.U[:, :2].T @ weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("extra", [0, 5])
def test_full_rank_is_exact(shape: tuple[int, int], extra: int) -> None:
    weight, _, moment = _problem(*shape)
    outer, inner = low_rank_factors(weight, whitened_svd(weight, moment), min(shape) + extra)
    assert outer.shape[1] == inner.shape[0] == min(shape)
    torch.testing.assert_close(outer @ inner, weight)


def test_split_is_symmetric() -> None:
    weight, _, moment = _problem(9, 13)
    svd = whitened_svd(weight, moment)
    outer, inner = low_rank_factors(weight, svd, 4)
    gram = torch.diag(svd.S[:4])
    torch.testing.assert_close(outer.T @ outer, gram)
    damped = moment + 1e-6 * moment.diagonal().mean() * torch.eye(13, dtype=torch.float64)
    torch.testing.assert_close(inner @ damped @ inner.T, gram)


def test_dead_columns_and_few_tokens_stay_finite_and_exact_at_full_rank() -> None:
    weight, inputs, _ = _problem(6, 13, tokens=4)
    inputs[:, 3] = 0.0
    outer, inner = low_rank_factors(weight, whitened_svd(weight, inputs.T @ inputs), 6)
    torch.testing.assert_close(outer @ inner, weight, rtol=1e-6, atol=1e-6)


def test_zero_weight_gives_zero_factors() -> None:
    _, _, moment = _problem(6, 9)
    weight = torch.zeros(6, 9)
    outer, inner = low_rank_factors(weight, whitened_svd(weight, moment), 3)
    assert not outer.any()
    assert not inner.any()


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_zero_is_an_error(rank: int) -> None:
    weight, _, moment = _problem(6, 9)
    with pytest.raises(ValueError, match=f"rank of at least 1, not {rank}"):
        low_rank_factors(weight, whitened_svd(weight, moment), rank)


def test_broken_values_are_an_error() -> None:
    weight, _, moment = _problem(6, 9)
    with pytest.raises(NumericsError, match="second moment"):
        whitened_svd(weight, moment * float("nan"))
    weight[2, 3] = float("inf")
    with pytest.raises(NumericsError, match=r"weight \(6, 9\) holds 1 values"):
        whitened_svd(weight, moment)
