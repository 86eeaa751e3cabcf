"""Round to nearest against an exhaustive search of its grid."""

import pytest
import torch

from casp_pl.errors import ConfigError, InputError, NumericsError
from casp_pl.layers import UniformLinear
from casp_pl.linalg import relative_proxy_loss
from casp_pl.quantizers import RTNQuantizer


def _weight(rows: int, columns: int) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def _quantize(weight: torch.Tensor, bits: int, group_size: int = 64) -> UniformLinear:
    return RTNQuantizer(group_size=group_size).quantize(weight, torch.eye(weight.shape[1]), bits=bits)


@pytest.mark.parametrize("bits", RTNQuantizer.levels)
@pytest.mark.parametrize(("columns", "group_size"), [(128, 64), (13, 4), (70, 64), (3, 8)])
def test_every_weight_is_the_nearest_point_of_its_grid(bits: int, columns: int, group_size: int) -> None:
    weight = _weight(5, columns)
    layer = _quantize(weight, bits, group_size)
    group = torch.arange(columns) // group_size
    zeros, scales = layer.zeros_unpacked()[:, group].float(), layer.scales.detach()[:, group]
    grid = (torch.arange(2**bits) - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)
    nearest = (grid - weight.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((layer.dequantize() - weight).abs(), nearest, rtol=0.0, atol=1e-7)


@pytest.mark.parametrize("bits", RTNQuantizer.levels)
def test_the_grid_spans_the_weights_of_its_group(bits: int) -> None:
    weight = _weight(9, 130)
    layer = _quantize(weight, bits)
    error = (layer.dequantize() - weight).abs()
    assert (error <= 1.01 * layer.scales.detach().repeat_interleave(64, 1)[:, :130]).all()
    ranges = torch.nn.functional.pad(weight, (0, 62)).view(9, 3, 64)
    expected = (ranges.amax(-1).clamp(min=0) - ranges.amin(-1).clamp(max=0)) / (2**bits - 1)
    torch.testing.assert_close(layer.scales.detach(), expected, rtol=5e-4, atol=2.0**-25)


def test_the_error_falls_with_the_bits() -> None:
    weight, moment = _weight(24, 100), torch.eye(100)
    losses = [relative_proxy_loss(weight, _quantize(weight, bits).dequantize(), moment) for bits in (2, 3, 4, 8)]
    assert all(after < before / 3 for before, after in zip(losses, losses[1:], strict=False))
    assert losses[-1] < 1e-4


@pytest.mark.parametrize(("shape", "bias"), [((6, 13), True), ((3, 64), False)])
@pytest.mark.parametrize("bits", RTNQuantizer.levels)
def test_plan_and_result_agree(shape: tuple[int, int], bias: bool, bits: int) -> None:
    quantizer = RTNQuantizer(group_size=8)
    offset = torch.arange(float(shape[0])) if bias else None
    layer = quantizer.quantize(_weight(*shape), torch.eye(shape[1]), bits=bits, bias=offset)
    assert layer.spec() == quantizer.layer_spec(*shape, bits=bits, bias=bias)
    assert layer.storage_bits == quantizer.storage_bits(*shape, bits=bits)
    assert layer.code_bits == quantizer.code_bits(*shape, bits=bits) == shape[0] * shape[1] * bits
    assert (layer.bias is None) if offset is None else torch.equal(layer.bias, offset)


def test_two_bits_in_groups_of_64_cost_what_the_docstring_says() -> None:
    assert RTNQuantizer().storage_bits(576, 576, bits=2) / 576**2 == pytest.approx(2.28, abs=0.005)


def test_zero_rows_constant_rows_and_tiny_rows_are_exact_or_finite() -> None:
    weight = torch.stack([torch.zeros(9), torch.full((9,), 0.5), torch.full((9,), -0.25), torch.full((9,), 1e-30)])
    restored = _quantize(weight, 2).dequantize()
    torch.testing.assert_close(restored, weight, rtol=1e-3, atol=1e-6)


def test_rounding_to_storage_changes_nothing() -> None:
    layer = _quantize(_weight(5, 13).bfloat16(), 3)
    before = layer.dequantize()
    layer.round_to_storage()
    assert torch.equal(layer.dequantize(), before)


def test_bad_input_is_named() -> None:
    quantizer, weight = RTNQuantizer(), _weight(4, 6)
    with pytest.raises(ConfigError, match="rtn cannot do 5 bits: choose one of 2, 3, 4, 8"):
        quantizer.quantize(weight, torch.eye(6), bits=5)
    with pytest.raises(ConfigError, match="group_size"):
        RTNQuantizer(group_size=0)
    with pytest.raises(InputError, match=r"\(4, 6\) and \(5, 5\)"):
        quantizer.quantize(weight, torch.eye(5), bits=2)
    weight[1, 2] = float("nan")
    with pytest.raises(NumericsError, match=r"weight \(4, 6\) holds 1 values"):
        quantizer.quantize(weight, torch.eye(6), bits=2)
