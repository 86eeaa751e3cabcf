"""A product whose weight is rebuilt backwards against autograd's own, which keeps the weight."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from casp_pl.kernels.additive import dequantize_additive_reference
from casp_pl.layers import product
from casp_pl.layers.product import rebuilt_linear, row_tiles

ROWS, GROUPS, LENGTH = 5, 3, 4


TILES = [slice(0, 2), slice(2, 4), slice(4, 5)]


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices are treated as large ones."""
    monkeypatch.setattr(product, "_LARGE", 0)


def _case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Callable[[slice], Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (ROWS, GROUPS, 2), generator=generator)
    sizes = [(2, 8, LENGTH), (ROWS, 1)]
    tables = [torch.randn(size, generator=generator, dtype=dtype).requires_grad_() for size in sizes]
    x = torch.randn(2, 3, GROUPS * LENGTH, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(ROWS, generator=generator, dtype=dtype).requires_grad_()
    return x, lambda rows: dequantize_additive_reference(codes[rows], tables[0], tables[1][rows]), tables, bias


@pytest.mark.parametrize("tiles", [TILES, [slice(0, ROWS)]])
def test_gradients_by_finite_differences(tiles: list[slice]) -> None:
    x, dequantize, tables, bias = _case()
    assert torch.autograd.gradcheck(lambda x, b, *own: rebuilt_linear(x, dequantize, tiles, own, b), (x, bias, *tables))


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("frozen", [None, "x", "codebooks", "tables"])
def test_results_equal_autograds_own(frozen: str | None, narrow: bool) -> None:
    x, dequantize, tables, bias = _case(torch.float32)
    still = {None: [], "x": [x], "codebooks": tables[:1], "tables": tables}[frozen]
    for tensor in still:
        tensor.requires_grad_(False)
    trained = [tensor for tensor in (x, *tables, bias) if tensor.requires_grad]
    results = []
    for compute in (
        lambda: rebuilt_linear(x, dequantize, TILES, tuple(tables), bias),
        lambda: F.linear(x, dequantize(slice(None)), bias),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            y = compute()
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), trained)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        if narrow:  # the bias is added before the rounding to bfloat16, or after it
            assert float((ours - theirs).float().norm()) < 0.01 * float(theirs.float().norm())
        else:
            torch.testing.assert_close(ours, theirs)


def test_a_single_token_without_a_batch() -> None:
    x, dequantize, tables, bias = _case()
    token = x[0, 0].detach().requires_grad_()
    compute = lambda x, b, *own: rebuilt_linear(x, dequantize, TILES, own, b)  # noqa: E731
    assert compute(token, bias, *tables).shape == (ROWS,)
    assert torch.autograd.gradcheck(compute, (token, bias, *tables))


@pytest.mark.parametrize("autocast", [False, True])
def test_tiles_are_added_up_in_more_than_sixteen_bits(autocast: bool) -> None:
    """A hundred tiles of a row each, which alone would each be lost: rounded once, not after every tile."""
    rows = 129
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(rows, 16, generator=generator).bfloat16().float().requires_grad_()
    x = torch.ones(2, 16, dtype=torch.float32 if autocast else torch.bfloat16, requires_grad=True)
    tiles = [slice(row, row + 1) for row in range(rows)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = rebuilt_linear(x, lambda tile: table[tile], tiles, (table,))
    y.float().sum().backward()
    expected = table.detach().double().sum(dim=0).expand(2, -1)
    limit = 1e-6 if autocast else torch.finfo(torch.bfloat16).eps / 2
    assert x.grad.dtype == x.dtype
    torch.testing.assert_close(x.grad.double(), expected, rtol=limit, atol=0)


def test_the_weight_is_not_kept() -> None:
    x, dequantize, tables, _ = _case()
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda t: t
    ):
        rebuilt_linear(x, dequantize, TILES, tuple(tables), None)
    assert kept == [tuple(x.shape)]
    with torch.no_grad():
        assert not rebuilt_linear(x, dequantize, TILES, tuple(tables), None).requires_grad


def test_a_small_weight_is_left_to_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_LARGE", ROWS * GROUPS * LENGTH)
    x, dequantize, tables, bias = _case()
    assert torch.autograd.gradcheck(lambda x, b, *own: rebuilt_linear(x, dequantize, TILES, own, b), (x, bias, *tables))
    assert "_Product" not in type(rebuilt_linear(x, dequantize, TILES, tuple(tables)).grad_fn).__name__


def test_tiles_cover_all_rows_once_in_order() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for rows, columns in [(1, 1), (576, 576), (4096, 4096), (11008, 4097), (70, 1 << 22)]:
        tiles = row_tiles(rows, columns, cpu)
        assert [row for tile in tiles for row in range(rows)[tile]] == list(range(rows))
        assert all(tile.stop - tile.start <= max(64, (16 << 20) // (4 * columns)) for tile in tiles)
        assert row_tiles(rows, columns, gpu) == [slice(0, rows)]
