"""Hadamard matrices by their definition, fields by counting, fast transforms against the dense matrix."""

import sys
import types

import pytest
import torch

from casp_pl.linalg.finite_field import prime_power, residue_matrix
from casp_pl.linalg.hadamard import hadamard_matrix, is_constructible
from casp_pl.linalg.hadamard_extension import runs_extension
from casp_pl.linalg.orthogonal import (
    transform_columns,
    transform_matrix,
    transform_name,
    transform_orders,
    transform_path,
    transform_rows,
)

# What Sylvester and Paley leave out (the next, 236, and so on); some are known by other constructions, 668 by none.
MISSING = {92, 116, 156, 172, 184, 188, 232}
MODEL_WIDTHS = (576, 1536, 4096, 5120, 11008, 13824, 14336, 8960, 18944, 29568)
FACTOR_WIDTHS = (8, 16, 24, 40, 48, 56, 64, 72, 80, 88, 96, 104, 128)


def test_every_multiple_of_four_but_the_known_gaps_can_be_constructed() -> None:
    assert {n for n in range(1, 236) if is_constructible(n)} == {1, 2, *range(4, 236, 4)} - MISSING
    assert all(is_constructible(n) for n in (*MODEL_WIDTHS, *FACTOR_WIDTHS))
    with pytest.raises(ValueError, match="92"):
        hadamard_matrix(92)


def test_rows_are_orthogonal_exactly_and_entries_are_signs() -> None:
    for order in [n for n in range(1, 400) if is_constructible(n)]:
        matrix = hadamard_matrix(order)
        assert matrix.shape == (order, order)
        assert (matrix.abs() == 1).all()
        wide = matrix.to(torch.float32)  # sums of at most 400 signs are exact
        assert torch.equal(wide @ wide.T, order * torch.eye(order))


def test_powers_of_two_are_sylvesters_in_natural_order() -> None:
    index = torch.arange(32)
    ones = sum((index[:, None] & index) >> bit & 1 for bit in range(5))
    assert torch.equal(hadamard_matrix(32), (1 - 2 * (ones % 2)).to(torch.int8))


@pytest.mark.parametrize("field", [3, 5, 7, 9, 25, 27, 49, 81, 125, 343])
def test_residues_have_the_correlations_of_a_field(field: int) -> None:
    """Jacobsthal: Q Q^T = q I - J and Q J = 0, which no ring with zero divisors satisfies."""
    matrix = residue_matrix(field).to(torch.float64)
    expected = field * torch.eye(field, dtype=torch.float64) - 1
    assert torch.equal(matrix @ matrix.T, expected)
    assert not matrix.sum(dim=1).any()
    assert torch.equal(matrix.T, matrix if field % 4 == 1 else -matrix)


def test_prime_powers() -> None:
    known = {2: (2, 1), 8: (2, 3), 9: (3, 2), 343: (7, 3), 97: (97, 1), 1: None, 0: None, 12: None, 45: None}
    assert {number: prime_power(number) for number in known} == known
    with pytest.raises(ValueError, match="odd prime"):
        residue_matrix(8)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 6, 7, 12, 13, 36, 40, 72, 92, 96, 100, 184, 200, 269, 576])
@pytest.mark.parametrize("inverse", [False, True])
def test_fast_transforms_are_the_dense_matrix(width: int, inverse: bool) -> None:
    matrix = transform_matrix(width)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.randn(2, 3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width))
    dense = matrix.T if inverse else matrix
    torch.testing.assert_close(transform_rows(x, inverse=inverse), x @ dense.T)
    columns = x.flatten(0, 1).T
    torch.testing.assert_close(transform_columns(columns, inverse=inverse), dense @ columns)


@pytest.mark.parametrize("width", [*MODEL_WIDTHS, *FACTOR_WIDTHS])
def test_model_widths_take_hadamard_matrices_and_small_factors(width: int) -> None:
    orders = transform_orders(width)
    assert orders.hartley == 1
    assert orders.outer * orders.inner == width
    assert orders.outer + orders.inner < 7 * width**0.5


def test_other_widths_take_as_little_hartley_as_possible() -> None:
    assert transform_orders(92) == (4, 1, 23)
    assert transform_orders(184) == (8, 1, 23)
    assert transform_orders(13) == (1, 1, 13)
    assert transform_orders(6) == (2, 1, 3)
    assert transform_orders(4304) == (16, 1, 269)
    with pytest.raises(ValueError, match="not 0"):
        transform_orders(0)


@pytest.mark.parametrize("width", [5, 13, 92, 269])
def test_entries_of_a_hartley_transform_are_nearly_as_flat(width: int) -> None:
    assert transform_matrix(width).abs().max() * width**0.5 <= 2**0.5
    spike = torch.zeros(width, dtype=torch.float64)
    spike[width // 2] = 1
    assert transform_rows(spike).abs().max() <= (2 / width) ** 0.5


def test_gradients_flow_and_inference_mode_leaves_no_trace() -> None:
    with torch.inference_mode():
        transform_rows(torch.ones(1, 28))
    x = torch.randn(3, 28, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(transform_rows, (x,))
    ones = torch.ones(1, 28, requires_grad=True)
    transform_rows(ones).sum().backward()
    torch.testing.assert_close(ones.grad, transform_matrix(28).float().sum(0, keepdim=True), rtol=1e-5, atol=1e-5)


def test_a_cpu_uses_matrix_products() -> None:
    assert transform_path(64, torch.device("cpu")) == "gemm"
    assert transform_name(torch.device("cpu")) == "ours"


@pytest.mark.parametrize(
    ("build", "used"),
    [
        (lambda x, scale: scale * x @ hadamard_matrix(x.shape[-1]).to(x.dtype), True),
        (lambda x, scale: scale * x, False),
        (lambda x, scale: 1 / 0, False),
        (None, False),
    ],
    ids=["works", "wrong numbers", "raises", "not there"],
)
def test_the_extension_is_used_only_where_it_gives_the_right_numbers(monkeypatch, build, used: bool) -> None:
    module = None if build is None else types.ModuleType("fast_hadamard_transform")
    if module is not None:
        module.hadamard_transform = build
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", module)
    monkeypatch.setattr("casp_pl.linalg.hadamard_extension._TRIED", ("cpu",))
    runs_extension.cache_clear()
    try:
        device = torch.device("cpu")
        assert runs_extension(device) == used
        assert transform_path(64, device) == ("fast_hadamard_transform" if used else "gemm")
        assert transform_name(device).startswith("fast-hadamard-transform" if used else "ours")
        assert transform_path(96, device) == "gemm"
        assert transform_path(2**16, device) == transform_path(64, device, torch.float64) == "gemm"
        x = torch.randn(3, 64)
        torch.testing.assert_close(transform_rows(x).double(), x.double() @ transform_matrix(64).T, rtol=0, atol=1e-5)
        columns = transform_columns(x.T, inverse=True)
        torch.testing.assert_close(columns.double(), transform_matrix(64).T @ x.T.double(), rtol=0, atol=1e-5)
    finally:
        runs_extension.cache_clear()
