"""Incoherent weights and second moments against the dense formula, and closed-form diagonals against a line search."""

import pytest
import torch
from torch import Tensor

from casp_pl.linalg.diagonal_fit import best_column_factors, best_row_factors
from casp_pl.linalg.incoherence import incoherent_moment, incoherent_weight, random_signs
from casp_pl.linalg.losses import proxy_loss
from casp_pl.linalg.orthogonal import transform_matrix


def _problem(rows: int, columns: int) -> tuple[Tensor, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(rows)
    root = torch.randn(columns, 2 * columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, root @ root.T, generator


@pytest.mark.parametrize(("rows", "columns", "width"), [(12, 16, 16), (7, 13, 16), (1, 1, 8), (92, 20, 24)])
def test_the_dense_formula_and_its_loss(rows: int, columns: int, width: int) -> None:
    weight, moment, generator = _problem(rows, columns)
    su, sv = (random_signs(n, generator, device=torch.device("cpu")) for n in (columns, rows))
    right = torch.nn.functional.pad(su.double().diag(), (0, width - columns)) @ transform_matrix(width).T
    left = transform_matrix(rows) @ sv.double().diag()
    mixed, mixed_moment = incoherent_weight(weight, su, sv, width), incoherent_moment(moment, su, width)
    torch.testing.assert_close(mixed, left @ weight @ right)
    torch.testing.assert_close(mixed_moment, right.T @ moment @ right)
    assert torch.equal(mixed_moment, mixed_moment.T)
    energy = proxy_loss(weight, torch.zeros_like(weight), moment)
    assert proxy_loss(mixed, torch.zeros_like(mixed), mixed_moment) == pytest.approx(energy)


def test_an_outlier_is_spread_over_the_whole_matrix() -> None:
    weight = torch.zeros(96, 576)
    weight[5, 77] = 1.0
    su, sv = (random_signs(n, torch.Generator().manual_seed(0), device=torch.device("cpu")) for n in (576, 96))
    mixed = incoherent_weight(weight, su, sv, 576)
    torch.testing.assert_close(mixed.abs(), torch.full_like(mixed, (96 * 576) ** -0.5))


def test_signs_are_fair_and_come_from_the_generator() -> None:
    cpu = torch.device("cpu")
    first, second = (random_signs(4096, torch.Generator().manual_seed(3), device=cpu) for _ in range(2))
    assert torch.equal(first, second)
    assert set(first.tolist()) == {-1.0, 1.0}
    assert abs(float(first.mean())) < 0.05


def test_diagonal_factors_are_the_minimum() -> None:
    weight, moment, generator = _problem(9, 14)
    approx = weight * 1.3 + 0.5 * torch.randn(9, 14, generator=generator, dtype=torch.float64)
    rows, columns = best_row_factors(weight, approx, moment), best_column_factors(weight, approx, moment.clone())
    best = {0: proxy_loss(weight, rows[:, None] * approx, moment), 1: proxy_loss(weight, approx * columns, moment)}
    assert max(best.values()) < proxy_loss(weight, approx, moment)
    for _ in range(20):
        step = 1e-2 * torch.randn(9, generator=generator, dtype=torch.float64)
        assert proxy_loss(weight, (rows + step)[:, None] * approx, moment) > best[0]
        step = 1e-2 * torch.randn(14, generator=generator, dtype=torch.float64)
        assert proxy_loss(weight, approx * (columns + step), moment) > best[1]


def test_what_nothing_depends_on_keeps_its_factor() -> None:
    weight, moment, _ = _problem(4, 6)
    approx = weight.clone()
    approx[2], approx[:, 3] = 0, 0
    factors = best_row_factors(weight, approx, moment)
    assert factors[2] == 1
    assert best_column_factors(weight, approx, moment.clone())[3] == pytest.approx(1)
    assert (best_column_factors(weight, torch.zeros(4, 6), moment.clone()) == 1).all()
    assert (best_row_factors(torch.zeros_like(weight), weight, moment) == 0).all()
