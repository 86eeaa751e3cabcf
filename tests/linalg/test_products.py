import pytest
import torch

from casp_pl.linalg import ProductSum, add_products, full_width_products


@pytest.mark.parametrize("shape", [(300, 257, 129), (64, 2048, 96), (1, 576, 577)])
def test_products_stay_fp32(shape: tuple[int, int, int]) -> None:
    """bf16 would be a thousand times less exact."""
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    exact = a.double() @ b.double()
    with full_width_products():
        found = (a @ b, torch.nn.functional.linear(a, b.T), torch.bmm(a[None], b[None])[0], (b.T @ a.T).T)
    for product in found:
        assert (product - exact).norm() < 2e-6 * exact.norm()


@pytest.mark.parametrize(("columns", "others"), [(5, 3), (1024, 7), (1025, 7), (2100, 900)])
def test_products_are_added_strip_by_strip(columns: int, others: int) -> None:
    left, right = torch.randn(33, columns), torch.randn(33, others)
    start = torch.randn(columns, others, dtype=torch.float64)
    total = start.clone()
    add_products(total, left, right)
    exact = start + left.double().T @ right.double()
    assert (total - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize(("columns", "others"), [(5, 3), (1024, 7), (2100, 900)])
def test_a_sum_in_strips_is_narrowed_to_the_whole(columns: int, others: int) -> None:
    batches = [(torch.randn(tokens, columns), torch.randn(tokens, others)) for tokens in (33, 1, 40)]
    total = ProductSum(columns, others, torch.device("cpu"))
    for left, right in batches:
        total.add(left, right)
    mean = total.narrow(lambda strip: strip.div_(74))
    exact = sum(left.double().T @ right.double() for left, right in batches) / 74
    assert mean.dtype == torch.float32
    assert mean.shape == (columns, others)
    assert (mean - exact).norm() < 1e-6 * exact.norm()


def test_the_setting_is_put_back_also_after_an_error() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), full_width_products():
        raise ZeroDivisionError
    assert torch.backends.mkldnn.matmul.fp32_precision == before
