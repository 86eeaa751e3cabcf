import pytest
import torch

from casp_pl.linalg import full_width_products


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


def test_the_setting_is_put_back_also_after_an_error() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), full_width_products():
        raise ZeroDivisionError
    assert torch.backends.mkldnn.matmul.fp32_precision == before
