"""LowRankLinear against the dense product."""

import pytest
import torch
from torch import nn

from casp_pl.layers import AdditiveLinear, LowRankLinear, UniformLinear, build_layer

SPEC = {
    "kind": "low_rank",
    "in_features": 24,
    "out_features": 5,
    "bias": True,
    "rank": 8,
    "input_factor": {
        "kind": "additive",
        "in_features": 24,
        "out_features": 8,
        "bias": False,
        "num_codebooks": 2,
        "entries": 16,
        "group_length": 8,
    },
    "output_factor": {
        "kind": "uniform",
        "in_features": 8,
        "out_features": 5,
        "bias": True,
        "bits": 3,
        "group_size": 64,
    },
}


def _random_layer() -> LowRankLinear:
    layer = build_layer(SPEC)
    assert isinstance(layer, LowRankLinear)
    generator = torch.Generator().manual_seed(0)
    for name, value in layer.state_dict().items():
        random = torch.randint(0, 256, value.shape, generator=generator, dtype=torch.uint8)
        value.copy_(random if "codes" in name or "zeros" in name else random / 128 - 1)
    # three-bit codes fill whole bytes here, so any byte is a valid one
    return layer


def test_computes_the_product_of_the_factors() -> None:
    layer = _random_layer()
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(1))
    weight = layer.output_factor.dequantize() @ layer.input_factor.dequantize()
    assert torch.equal(layer.dequantize(), weight)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias), rtol=1e-4, atol=1e-4)
    assert (layer.rank, layer.in_features, layer.out_features) == (8, 24, 5)


def test_a_spec_rebuilds_itself_with_the_factors_kinds() -> None:
    layer = _random_layer()
    assert layer.spec() == SPEC
    assert isinstance(layer.input_factor, AdditiveLinear)
    assert isinstance(layer.output_factor, UniformLinear)


def test_bits_are_those_of_both_factors_over_the_dense_weights() -> None:
    layer = _random_layer()
    assert layer.code_bits == 8 * 3 * 2 * 4 + 5 * 8 * 3
    tables = (
        16 * (2 * 16 * 8 + 8) + 16 * 5 + 8 * 2
    )  # codebooks and row scales; group scales; 5 zeros of 3 bits in 2 bytes
    assert layer.storage_bits == layer.code_bits + tables
    assert layer.bits_per_weight == layer.storage_bits / (24 * 5)
    assert layer.nbytes == -(-layer.storage_bits // 8)


def test_dense_factors_cost_16_bits_a_weight_and_are_rounded_to_them() -> None:
    layer = LowRankLinear(input_factor=nn.Linear(24, 3, bias=False), output_factor=nn.Linear(3, 5))
    assert layer.storage_bits == layer.code_bits == 16 * (24 * 3 + 3 * 5)
    layer.round_to_storage()
    for factor in (layer.input_factor, layer.output_factor):
        assert torch.equal(factor.weight, factor.weight.half().float())
    again = build_layer(layer.spec())
    again.load_state_dict(layer.state_dict())
    x = torch.randn(4, 24)
    assert torch.equal(again(x), layer(x))


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="factors do not fit"):
        LowRankLinear(input_factor=nn.Linear(24, 3, bias=False), output_factor=nn.Linear(4, 5))
    with pytest.raises(ValueError, match="factors do not fit"):
        LowRankLinear(input_factor=nn.Linear(24, 3), output_factor=nn.Linear(3, 5))
