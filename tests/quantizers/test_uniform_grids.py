"""Grids of uniform codes against trying every point."""

import pytest
import torch
from torch import Tensor

from casp_pl.quantizers.uniform_grids import nearest_codes, range_grid, searched_grid


def _cost(weight: Tensor, importance: Tensor, zeros: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Weighted square error (O,) of the nearest points: weight (D, O), importance (D,)."""
    points = (torch.arange(2**bits)[:, None] - zeros) * scales  # (P, O)
    return ((weight[None] - points[:, None]).square().amin(dim=0) * importance[:, None]).sum(dim=0)


def _group(length: int = 24, rows: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(length, rows, generator=generator), torch.rand(length, generator=generator) ** 3


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codes_are_nearest_points(bits: int) -> None:
    weight, _ = _group()
    zeros, scales = range_grid(0.6 * weight.amin(0), 0.6 * weight.amax(0), bits)
    codes = nearest_codes(weight, zeros, scales, bits)
    points = (torch.arange(2**bits)[:, None] - zeros) * scales
    nearest = (weight[None] - points[:, None]).abs().amin(dim=0)
    torch.testing.assert_close((weight - (codes - zeros) * scales).abs(), nearest)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_comes_near_to_the_best_grid_of_all(bits: int) -> None:
    weight, importance = _group()
    ranged, found = (searched_grid(weight, importance, bits, search=s) for s in (False, True))
    losses = [_cost(weight, importance, *grid, bits) for grid in (ranged, found)]
    assert (losses[1] <= losses[0] * (1 + 1e-5)).all()
    assert losses[1].sum() < 0.9 * losses[0].sum()
    best = torch.full_like(losses[0], float("inf"))
    for scale in torch.linspace(0.05, 3, 400) * 3 / (2**bits - 1):
        for zero in range(2**bits):
            grid = torch.full_like(best, zero), torch.full_like(best, float(scale))
            best = torch.minimum(best, _cost(weight, importance, *grid, bits))
    assert losses[1].sum() < 1.2 * best.sum()


@pytest.mark.parametrize("search", [False, True])
def test_columns_that_cost_nothing_do_not_shape_the_grid(search: bool) -> None:
    weight, importance = _group()
    loud = weight.clone()
    loud[5] = 100.0
    importance[5] = 0
    weight[5] = 0
    for a, b in zip(*(searched_grid(w, importance, 2, search=search) for w in (weight, loud)), strict=True):
        assert torch.equal(a, b)
    silent = searched_grid(loud, torch.zeros(24), 2, search=search)
    for a, b in zip(silent, searched_grid(loud, torch.ones(24), 2, search=search), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("search", [False, True])
def test_groups_are_independent_and_scales_fit_float16(search: bool) -> None:
    weight = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-9, 1.0, 1e5]).view(
        3, 1, 1
    )
    importance = torch.rand(3, 8, generator=torch.Generator().manual_seed(1))
    zeros, scales = searched_grid(weight, importance, 3, search=search)
    assert torch.equal(scales, scales.half().float())
    assert (scales > 0).all()
    for g in range(3):
        alone = searched_grid(weight[g], importance[g], 3, search=search)
        assert torch.equal(zeros[g], alone[0])
        assert torch.equal(scales[g], alone[1])
