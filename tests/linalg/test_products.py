import pytest
import torch

from casp_pl.linalg import GramSum, ProductSum, full_width_matmul, full_width_product, full_width_products


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


@pytest.mark.parametrize(("columns", "others"), [(5, 3), (512, 7), (513, 7), (1100, 900)])
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


@pytest.mark.parametrize("width", [1, 5, 512, 513, 1100])
def test_a_triangle_is_narrowed_to_the_whole(width: int) -> None:
    batches = [torch.randn(tokens, width) for tokens in (33, 1, 40)]
    total = GramSum(width, torch.device("cpu"))
    for x in batches:
        total.add(x)
    mean = total.narrow(lambda strip: strip.div_(74))
    exact = sum(x.double().T @ x.double() for x in batches) / 74
    assert mean.dtype == torch.float32
    assert torch.equal(mean, mean.T)
    assert (mean - exact).norm() < 1e-6 * exact.norm()


def test_the_setting_is_put_back_also_after_an_error() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), full_width_products():
        raise ZeroDivisionError
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_only_a_large_product_is_worth_the_setting() -> None:
    def setting(rows: int, weights: int) -> str:
        with full_width_product(rows, weights):
            return str(torch.backends.mkldnn.matmul.fp32_precision)

    with full_width_products():
        wide = str(torch.backends.mkldnn.matmul.fp32_precision)
    before = torch.backends.mkldnn.matmul.fp32_precision
    assert setting(1, 4096 * 4096) == setting(4096, 64 * 64) == before
    assert setting(32, 576 * 576) == setting(4096, 576 * 576) == wide


@pytest.mark.parametrize(("inner", "columns"), [(576, 576), (256, 256), (1536, 1536), (255, 260)])
def test_a_share_of_the_rows_comes_out_as_among_all(inner: int, columns: int) -> None:
    left, right = torch.randn(192, inner), torch.randn(inner, columns)
    whole = full_width_matmul(left, right)
    for count in (2, 4, 6):
        parts = [full_width_matmul(part, right) for part in torch.chunk(left, count)]
        assert torch.equal(torch.cat(parts), whole)
