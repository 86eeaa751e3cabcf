"""Grids of uniform codes against trying every point."""

import logging

import pytest
import torch
from torch import Tensor

from casp_pl.errors import NumericsError
from casp_pl.quantizers import GPTQQuantizer, Quantizer, RTNQuantizer
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


@pytest.mark.parametrize("quantizer", [RTNQuantizer(group_size=6), GPTQQuantizer(group_size=6)])
@pytest.mark.parametrize(("factor", "words"), [(1e-9, "those of 2 small groups"), (1e8, "those of 2 large ones")])
def test_scales_outside_float16_are_told(
    quantizer: Quantizer, factor: float, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Two of 5 rows, 13 columns in 3 groups; a group of zeros or dead columns needs no scale."""
    weight = torch.randn(5, 13, generator=torch.Generator().manual_seed(0)) + 3
    weight[[1, 3]] *= factor
    weight[1, :6] = weight[3, 6:12] = 0
    weight[:, 12] = 1
    with caplog.at_level(logging.WARNING):
        quantizer.quantize(weight, torch.diag(torch.arange(13.0, 0, -1)), bits=2)  # the order of columns stays
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith("2 of 15 groups of the weight (5, 13) need scales outside float16, 6.0e-08 to")
    assert words in caplog.messages[0]
    with pytest.raises(NumericsError, match=r"all \d+ groups of the weight \(5, 13\) need scales outside float16"):
        quantizer.quantize(factor * torch.ones(5, 13), torch.eye(13), bits=2)


def test_nothing_is_told_of_weights_that_fit(caplog: pytest.LogCaptureFixture) -> None:
    weight = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    weight[:, :8] = 0
    moment = torch.diag((torch.arange(20) != 11).float())
    weight[:, 11] = 1e9
    with caplog.at_level(logging.WARNING):
        for factor in (1e-3, 1.0, 1e3):
            layer = GPTQQuantizer(group_size=4, static_groups=True).quantize(factor * weight, moment, bits=4)
            assert (layer.dequantize()[:, 11] == 0).all()
        RTNQuantizer(group_size=4).quantize(torch.zeros(4, 20), moment, bits=2)
    assert not caplog.records
