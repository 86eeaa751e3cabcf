"""Low-rank layers of attention projections, dense and quantized."""

import logging

import pytest
import torch
from torch import Tensor, nn

from casp_pl.errors import ConfigError
from casp_pl.linalg import low_rank_factors, proxy_loss, relative_proxy_loss, whitened_svd
from casp_pl.quantizers import GPTQQuantizer, RTNQuantizer, quantize_low_rank
from casp_pl.quantizers.low_rank import low_rank_storage_bits, refit_output_factor, rotate_input_factor

COLUMNS = 24


def _problem(rows: int = 16) -> tuple[Tensor, Tensor]:
    """Weight (O, I) and second moment (I, I) of correlated inputs."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, COLUMNS, generator=generator)
    inputs = torch.randn(200, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    return weight, inputs.T @ inputs


@pytest.mark.parametrize("rows", [16, 24, 40, 6])
@pytest.mark.parametrize("extra", [0, 7])
def test_forward_equals_dense_at_full_rank(rows: int, extra: int) -> None:
    weight, moment = _problem(rows)
    bias = torch.arange(float(rows))
    layer = quantize_low_rank(weight, moment, min(rows, COLUMNS) + extra, None, bias=bias)
    x = torch.randn(2, 5, COLUMNS, generator=torch.Generator().manual_seed(1))
    assert layer.rank == min(rows, COLUMNS)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_query_and_key_of_grouped_query_attention_get_their_own_factors() -> None:
    """The authors' release writes the factors of k into q."""
    query, moment = _problem(18)
    key, _ = _problem(6)
    layers = [quantize_low_rank(weight, moment, 4, RTNQuantizer(), bits=8) for weight in (query, key)]
    assert [layer.out_features for layer in layers] == [18, 6]
    assert [layer.rank for layer in layers] == [4, 4]
    assert not torch.equal(layers[0].input_factor.codes, layers[1].input_factor.codes)
    for weight, layer in zip((query, key), layers, strict=True):
        dense = quantize_low_rank(weight, moment, 4, None).dequantize().detach()
        torch.testing.assert_close(layer.dequantize(), dense, rtol=0.0, atol=0.05 * float(dense.abs().max()))


def test_refit_is_weighted_least_squares() -> None:
    weight, moment = _problem()
    inner = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    root = torch.linalg.cholesky(moment.double())
    expected = torch.linalg.lstsq((inner @ root).T, (weight.double() @ root).T).solution.T
    outer, inner_moment = refit_output_factor(weight, moment, inner)
    torch.testing.assert_close(outer, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(inner_moment, (inner @ root) @ (inner @ root).T)


@pytest.mark.parametrize("bits", [2, 3])
def test_refit_repairs_what_the_first_factor_lost(bits: int) -> None:
    weight, moment = _problem()
    dense = quantize_low_rank(weight, moment, 8, None)
    inner = RTNQuantizer().quantize(dense.input_factor.weight, moment, bits=bits).dequantize().detach()
    outer, _ = refit_output_factor(weight, moment, inner)
    refitted = proxy_loss(weight, outer.float() @ inner, moment)
    assert refitted < 0.9 * proxy_loss(weight, dense.output_factor.weight @ inner, moment)


def test_rotation_keeps_the_span_and_evens_out_the_output_factor() -> None:
    weight, moment = _problem(40)
    weight = torch.logspace(0, -2, 40).unsqueeze(1) * weight  # a spectrum that decays
    svd = whitened_svd(weight, moment)
    outer, inner = low_rank_factors(weight, svd, 16)
    rotated = rotate_input_factor(inner, svd.S)
    refitted, _ = refit_output_factor(weight, moment, rotated)
    torch.testing.assert_close(refitted @ rotated, outer @ inner, rtol=1e-3, atol=1e-3)
    spreads = [float(factor.norm(dim=0).max() / factor.norm(dim=0).min()) for factor in (outer, refitted)]
    assert spreads[1] < 0.5 * spreads[0]


@pytest.mark.parametrize("seed", range(4))
def test_rotation_lowers_the_loss(seed: int) -> None:
    """A weight whose singular values fall a hundredfold, as those of W_q and W_k do."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, 80, generator=generator) @ torch.randn(80, 80, generator=generator)
    inputs = inputs * torch.logspace(0, -1, 80)
    left, _, right = torch.linalg.svd(torch.randn(96, 80, generator=generator), full_matrices=False)
    weight, moment = (left * torch.logspace(0, -2, 80)) @ right, inputs.T @ inputs / 400
    quantizer = GPTQQuantizer(group_size=16)
    layers = [quantize_low_rank(weight, moment, 32, quantizer, bits=3, rotate=rotate) for rotate in (True, False)]
    rotated, plain = (relative_proxy_loss(weight, layer.dequantize(), moment) for layer in layers)
    assert rotated < 0.8 * plain


def test_the_generator_decides_the_result() -> None:
    weight, moment = _problem()
    seeds = (1, 1, 2)
    first, again, other = (
        quantize_low_rank(
            weight, moment, 8, RTNQuantizer(), bits=3, generator=torch.Generator().manual_seed(seed)
        ).dequantize()
        for seed in seeds
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_more_bits_come_closer_to_the_dense_factors() -> None:
    weight, moment = _problem()
    layers = [quantize_low_rank(weight, moment, 8, RTNQuantizer(group_size=8), bits=bits) for bits in (2, 4, 8)]
    losses = [relative_proxy_loss(weight, layer.dequantize(), moment) for layer in layers]
    limit = relative_proxy_loss(weight, quantize_low_rank(weight, moment, 8, None).dequantize(), moment)
    assert losses[0] > losses[1] > losses[2] > limit
    assert losses[2] < 1.05 * limit


@pytest.mark.parametrize("bits", [3, 8])
def test_bits_are_what_was_announced(bits: int) -> None:
    weight, moment = _problem()
    quantizer = RTNQuantizer(group_size=8)
    layer = quantize_low_rank(weight, moment, 5, quantizer, bits=bits, bias=torch.ones(16))
    assert layer.storage_bits == low_rank_storage_bits(16, COLUMNS, 5, quantizer, bits=bits)
    assert layer.code_bits == bits * 5 * (16 + COLUMNS)
    assert torch.equal(layer.bias, torch.ones(16))
    assert layer.input_factor.bias is None


@pytest.mark.parametrize("moment", ["zero", "dead columns", "one token"])
def test_singular_second_moments_give_finite_layers(moment: str, caplog: pytest.LogCaptureFixture) -> None:
    weight, full = _problem()
    if moment == "dead columns":
        full[3:9], full[:, 3:9] = 0.0, 0.0
    if moment == "one token":
        full = torch.ones(COLUMNS, COLUMNS)
    if moment == "zero":
        full.zero_()
    with caplog.at_level(logging.WARNING):
        layer = quantize_low_rank(weight, full, 8, RTNQuantizer(), bits=4)
    assert layer.dequantize().isfinite().all()
    assert relative_proxy_loss(weight, layer.dequantize(), full) < 0.2


def test_zero_weights_stay_zero() -> None:
    _, moment = _problem()
    layer = quantize_low_rank(torch.zeros(16, COLUMNS), moment, 8, RTNQuantizer(), bits=2)
    assert not layer.dequantize().any()


def test_bad_settings_are_named() -> None:
    weight, moment = _problem()
    with pytest.raises(ValueError, match="rank of at least 1"):
        quantize_low_rank(weight, moment, 0, None)
    with pytest.raises(ConfigError, match="cannot do 7 bits"):
        quantize_low_rank(weight, moment, 4, RTNQuantizer(), bits=7)
