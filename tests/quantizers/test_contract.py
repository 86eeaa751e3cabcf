"""What every quantizer promises (casp_pl.quantizers.base), whatever its method."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from casp_pl.errors import ConfigError, InputError, NumericsError
from casp_pl.linalg.losses import relative_proxy_loss
from casp_pl.quantizers import AQLMQuantizer, GPTQQuantizer, Quantizer, QuIPSharpQuantizer

ALL = pytest.mark.parametrize("method", [AQLMQuantizer, GPTQQuantizer, QuIPSharpQuantizer])
SEARCHES = pytest.mark.parametrize("method", [AQLMQuantizer, QuIPSharpQuantizer])  # codes of vectors, chosen at random


def _problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight and the second moment of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator) @ mixing
    return 0.02 * torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


def _loss(layer: torch.nn.Module, weight: Tensor, moment: Tensor) -> float:
    return relative_proxy_loss(weight, layer.dequantize(), moment)


@SEARCHES
def test_same_seed_same_result(method: type[Quantizer]) -> None:
    weight, moment = _problem(24, 40)
    for bits in (2, 3):
        first, second = (method(seed=3).quantize(weight, moment, bits=bits) for _ in range(2))
        given = method(seed=3).quantize(weight, moment, bits=bits, generator=torch.Generator().manual_seed(3))
        other = method(seed=4).quantize(weight, moment, bits=bits)
        for name, tensor in first.state_dict().items():
            assert torch.equal(tensor, second.state_dict()[name])
            assert torch.equal(tensor, given.state_dict()[name])
        assert not torch.equal(first.codes, other.codes)


@ALL
def test_neither_global_random_state_nor_inputs_are_touched(method: type[Quantizer]) -> None:
    weight, moment = _problem(16, 24)
    kept, state = (weight.clone(), moment.clone()), torch.get_rng_state()
    method().quantize(weight, moment, bits=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weight, kept[0])
    assert torch.equal(moment, kept[1])


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(
    method: type[Quantizer], dtype: torch.dtype, under_default: Callable[..., AbstractContextManager[None]]
) -> None:
    weight, moment = _problem(300, 24)  # rows whose numbers bfloat16 does not hold
    expected = method().quantize(weight, moment, bits=3).state_dict()
    with under_default(dtype):
        actual = method().quantize(weight, moment, bits=3).state_dict()
    for name, tensor in expected.items():
        assert tensor.dtype == actual[name].dtype, name
        assert torch.equal(tensor, actual[name]), name


@ALL
@pytest.mark.parametrize("exponent", [-100, 100])
def test_the_unit_of_the_second_moment_does_not_matter(method: type[Quantizer], exponent: int) -> None:
    weight, moment = _problem(19, 44)
    layer, other = (method().quantize(weight, scale * moment, bits=2) for scale in (1.0, 2.0**exponent))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@SEARCHES
@pytest.mark.parametrize("name", ["zero", "rank one", "dead columns", "indefinite", "huge", "tiny"])
@pytest.mark.parametrize("columns", [20, 24])
def test_poor_second_moments_give_a_finite_layer(method: type[Quantizer], name: str, columns: int) -> None:
    weight, moment = _problem(32, columns)
    alive = (torch.arange(columns) % 3 > 0).float()
    poor = {
        "zero": torch.zeros(columns, columns),
        "rank one": torch.ones(columns, columns),
        "dead columns": moment * alive * alive[:, None],
        "indefinite": moment - 0.5 * moment.diagonal().mean() * torch.eye(columns),
        "huge": 1e12 * moment,
        "tiny": 1e-12 * moment,
    }[name]
    approx = method().quantize(weight, poor, bits=2).dequantize()
    assert approx.isfinite().all()
    assert (weight - approx).norm() < weight.norm()
    if name in ("huge", "tiny"):
        assert relative_proxy_loss(weight, approx, moment) < 0.125


@SEARCHES
@pytest.mark.parametrize("factor", [1e-6, 1e4])
def test_weights_of_unusual_size_survive_float16(method: type[Quantizer], factor: float) -> None:
    weight, moment = _problem(32, 24)
    usual = _loss(method().quantize(weight, moment, bits=2), weight, moment)
    layer = method().quantize(factor * weight, moment, bits=2)
    assert _loss(layer, factor * weight, moment) < 1.1 * usual


@SEARCHES
def test_low_precision_inputs_are_computed_in_float32(method: type[Quantizer]) -> None:
    weight, moment = _problem(24, 16)
    layer = method().quantize(weight.bfloat16(), moment.double(), bits=3)
    expected = method().quantize(weight.bfloat16().float(), moment, bits=3)
    assert all(table.dtype == torch.float32 for table in layer.tables().values())
    assert torch.equal(layer.dequantize(), expected.dequantize())


@ALL
def test_inputs_that_cannot_work(method: type[Quantizer]) -> None:
    weight, moment = _problem(4, 8)
    quantizer = method()
    with pytest.raises(ConfigError, match="cannot do 5 bits"):
        quantizer.quantize(weight, moment, bits=5)
    with pytest.raises(InputError, match="second moment"):
        quantizer.quantize(weight, moment[:4, :4], bits=2)
    for place in (0, 1):
        broken = [weight.clone(), moment.clone()]
        broken[place][1, 1] = torch.nan
        with pytest.raises(NumericsError, match="1 values"):
            quantizer.quantize(*broken, bits=2)
