"""The additive kernel against its plain formula, and the formula against a loop."""

import itertools

import pytest
import torch
from torch import Tensor

from casp_pl.kernels.additive import (
    AdditiveIndex,
    dequantize_additive,
    dequantize_additive_reference,
)

DTYPES = [torch.float64, torch.float32]  # by torch, by compiled loops
SHAPES = [(1, 1, 1, 2, 1), (5, 3, 2, 16, 8), (3, 7, 3, 256, 5), (130, 9, 1, 4, 2), (7, 5, 4, 256, 8), (1, 3, 5, 9, 8)]


def _random(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    rows, groups, books, entries, length = shape
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, entries, (rows, groups, books), generator=generator, dtype=torch.uint8)
    codebooks = torch.randn(books, entries, length, generator=generator, dtype=dtype)
    scales = torch.randn(rows, 1, generator=generator, dtype=dtype)
    return codes, codebooks, scales


def test_reference_is_the_formula() -> None:
    codes, codebooks, scales = _random((4, 3, 2, 8, 5))
    weight = torch.zeros(4, 15, dtype=torch.float64)
    for o in range(4):
        for g in range(3):
            for k in range(2):
                for d in range(5):
                    weight[o, 5 * g + d] += scales[o, 0] * codebooks[k, int(codes[o, g, k]), d]
    torch.testing.assert_close(dequantize_additive_reference(codes, codebooks, scales), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_equal_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    codes, codebooks, scales = _random(shape)
    gradient = torch.randn(
        shape[0], shape[1] * shape[4], dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    results = []
    for kind, dequantize in ((dtype, dequantize_additive), (torch.float64, dequantize_additive_reference)):
        tables = [codebooks.to(kind).requires_grad_(), scales.to(kind).requires_grad_()]
        weight = dequantize(codes, *tables)
        results.append([weight.detach(), *torch.autograd.grad(weight, tables, gradient.to(kind))])
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    for fast, slow in zip(*results, strict=True):
        assert fast.dtype == dtype
        torch.testing.assert_close(fast.double(), slow, **tolerance)


def test_gradients_by_finite_differences() -> None:
    codes, codebooks, scales = _random((4, 3, 2, 4, 3))
    index = AdditiveIndex(codes, 4)
    inputs = (codebooks.requires_grad_(), scales.requires_grad_())
    assert torch.autograd.gradcheck(lambda books, rows: dequantize_additive(index, books, rows), inputs)


def test_only_what_needs_a_gradient_gets_one() -> None:
    codes, codebooks, scales = _random((4, 3, 2, 4, 3))
    dequantize_additive(codes, codebooks, scales.requires_grad_()).sum().backward()
    assert scales.grad is not None
    assert codebooks.grad is None


def test_entries_that_nobody_reads_have_no_gradient() -> None:
    codes, codebooks, scales = _random((6, 4, 2, 256, 8))
    codebooks.requires_grad_()
    dequantize_additive(codes, codebooks, scales).sum().backward()
    for k in range(2):
        used = torch.zeros(256, dtype=torch.bool)
        used[codes[..., k].long().flatten()] = True
        assert torch.equal(codebooks.grad[k].abs().sum(1) > 0, used)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scatter_is_the_adjoint_of_gather(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    codes, codebooks, scales = _random(shape, dtype)
    index = AdditiveIndex(codes, shape[3])
    weight = torch.randn(shape[0], shape[1] * shape[4], dtype=dtype, generator=torch.Generator().manual_seed(2))
    left = (index.gather(codebooks, scales) * weight).sum()
    sums, dots = index.gradients(weight, codebooks, scales)
    assert torch.equal(index.scatter(weight, scales), sums)
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * float(weight.abs().sum())}
    torch.testing.assert_close((codebooks * sums).sum(), left, **tolerance)
    torch.testing.assert_close((scales * dots).sum(), left, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["compiled", "torch"])
def test_parts_of_the_rows_are_summed_apart(dtype: torch.dtype) -> None:
    shape, bounds = (11, 3, 2, 16, 4), [0, 0, 4, 5, 11]
    codes, _, scales = _random(shape, dtype)
    weight = torch.randn(11, 12, dtype=dtype, generator=torch.Generator().manual_seed(3))
    found = AdditiveIndex(codes, 16, bounds).scatter_parts(weight, scales)
    for part, (start, stop) in zip(found, itertools.pairwise(bounds), strict=True):
        expected = torch.zeros(2, 16, 4, dtype=dtype)
        for o in range(start, stop):
            for g, k in itertools.product(range(3), range(2)):
                expected[k, int(codes[o, g, k])] += scales[o] * weight[o, 4 * g : 4 * g + 4]
        torch.testing.assert_close(part, expected)


def test_more_entries_in_all_than_16_bits_count() -> None:
    codes, codebooks, scales = _random((2, 3, 130, 256, 2))
    gradient = torch.ones(2, 6, dtype=torch.float64)
    fast, slow = (
        torch.autograd.grad(dequantize(codes, codebooks.requires_grad_(), scales), codebooks, gradient)[0]
        for dequantize in (dequantize_additive, dequantize_additive_reference)
    )
    torch.testing.assert_close(fast, slow)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)  # by torch, by Triton
@pytest.mark.parametrize("shape", SHAPES)
def test_gpu_equals_cpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    results = []
    for device in ("cpu", "cuda"):
        codes, codebooks, scales = (tensor.to(device) for tensor in _random(shape, dtype))
        tables = [codebooks.requires_grad_(), scales.requires_grad_()]
        weight = dequantize_additive(codes, *tables)
        results.append([weight.detach(), *torch.autograd.grad(weight.square().sum(), tables)])
    for ours, theirs in zip(*results, strict=True):
        tolerance = {} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5 * float(ours.abs().max())}
        torch.testing.assert_close(theirs.cpu(), ours, **tolerance)


def test_float32_gradients_are_the_same_at_every_call() -> None:
    codes, codebooks, scales = _random((130, 9, 2, 16, 8), torch.float32)
    codebooks.requires_grad_()
    first, second = (
        torch.autograd.grad(dequantize_additive(codes, codebooks, scales).sum(), codebooks)[0] for _ in "ab"
    )
    assert torch.equal(first, second)
