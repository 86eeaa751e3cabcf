"""AdditiveLinear: what it computes, stores and counts."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from casp_pl.errors import ConfigError, NumericsError
from casp_pl.kernels.additive import dequantize_additive_reference
from casp_pl.layers import AdditiveLinear, build_layer

SHAPES = [(6, 16, 2, 256, 8), (5, 13, 2, 8, 8), (3, 7, 3, 16, 4), (4, 3, 1, 32, 8)]


def _random_layer(shape: tuple[int, ...] = SHAPES[1], *, bias: bool = True) -> tuple[AdditiveLinear, Tensor]:
    """A layer and its codes (O, G, K)."""
    rows, columns, books, entries, length = shape
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, entries, (rows, -(-columns // length), books), generator=generator)
    layer = AdditiveLinear.from_codes(
        codes,
        torch.randn(books, entries, length, generator=generator),
        torch.rand(rows, 1, generator=generator) + 0.5,
        in_features=columns,
        bias=torch.randn(rows, generator=generator) if bias else None,
    )
    return layer, codes


@pytest.mark.parametrize("shape", SHAPES)
def test_computes_with_the_formula(shape: tuple[int, ...]) -> None:
    layer, codes = _random_layer(shape)
    weight = dequantize_additive_reference(codes, layer.codebooks, layer.scales)[:, : shape[1]]
    assert torch.equal(layer.dequantize(), weight)
    assert torch.equal(layer.codes_unpacked(), codes.to(torch.uint8))
    x = torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_those_of_the_formula(shape: tuple[int, ...]) -> None:
    layer, codes = _random_layer(shape)
    x = torch.randn(9, shape[1], generator=torch.Generator().manual_seed(1), requires_grad=True)
    tables = [layer.codebooks, layer.scales]
    weight = dequantize_additive_reference(codes, *tables)[:, : shape[1]]
    wanted = torch.autograd.grad(nn.functional.linear(x, weight, layer.bias).square().sum(), [x, layer.bias, *tables])
    found = torch.autograd.grad(layer(x).square().sum(), [x, layer.bias, *tables])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_bytes_in_a_file_equal_the_reported_bits(shape: tuple[int, ...], bias: bool, tmp_path: Path) -> None:
    layer, codes = _random_layer(shape, bias=bias)
    layer.round_to_storage()
    state = {
        name: value if value.dtype == torch.uint8 else value.half()
        for name, value in layer.state_dict().items()
        if name != "bias"
    }
    save_file(state, tmp_path / "layer.safetensors")
    read = load_file(tmp_path / "layer.safetensors")
    assert sum(value.numel() * value.element_size() for value in read.values()) == layer.nbytes
    width = (shape[3] - 1).bit_length()
    assert layer.code_bits == codes.numel() * width
    assert layer.storage_bits == codes.numel() * width + 16 * (shape[2] * shape[3] * shape[4] + shape[0])
    assert layer.bits_per_weight == layer.storage_bits / (shape[0] * shape[1])


def test_bits_of_the_published_setting() -> None:
    layer = AdditiveLinear(in_features=4096, out_features=4096, num_codebooks=2, device="meta")
    assert layer.bits_per_weight_codes == 2.0
    assert layer.bits_per_weight == 2.0 + 16 * (2 * 256 * 8 + 4096) / 4096**2


def test_a_reload_from_float16_is_bit_equal_and_replaces_the_codes() -> None:
    layer, _ = _random_layer()
    layer.round_to_storage()
    stored = {name: v.half() if name in ("codebooks", "scales") else v for name, v in layer.state_dict().items()}
    again = build_layer(layer.spec())
    assert not again.dequantize().any()  # fills the cache with codes of zero
    again.load_state_dict(stored)
    assert torch.equal(again.dequantize(), layer.dequantize())
    assert again.spec() == layer.spec()


def test_set_codes_takes_effect_at_once_and_elsewhere_not() -> None:
    layer, codes = _random_layer()
    twin = copy.deepcopy(layer)
    before = layer.dequantize()
    changed = (codes + 1) % layer.entries
    layer.set_codes(changed)
    assert torch.equal(
        layer.dequantize(), dequantize_additive_reference(changed, layer.codebooks, layer.scales)[:, :13]
    )
    assert torch.equal(layer.codes_unpacked().long(), changed)
    assert torch.equal(twin.dequantize(), before)
    with pytest.raises(ValueError, match="has codes"):
        layer.set_codes(codes[:, :1])
    with pytest.raises(ValueError, match="do not fit"):
        layer.set_codes(codes + layer.entries)


def test_state_holds_packed_codes_and_tables_only() -> None:
    layer, _ = _random_layer()
    layer.dequantize()
    state = layer.state_dict()
    assert set(state) == {"codes", "codebooks", "scales", "bias"}
    assert state["codes"].dtype == torch.uint8
    assert state["codes"].numel() == -(-5 * 2 * 2 * 3 // 8)


def test_training_works_after_inference_mode() -> None:
    layer, _ = _random_layer()
    x = torch.ones(40, 13)  # more than are looked up: one path in both modes
    with torch.inference_mode():
        expected = layer(x).clone()
        layer(x[:1])
    output = layer(x)
    output.sum().backward()
    assert torch.equal(output.detach(), expected)
    assert layer.codebooks.grad is not None


@pytest.mark.parametrize("trained", [True, False])
def test_gradient_of_the_weight_is_summed_over_passes(trained: bool) -> None:
    layer, _ = _random_layer()
    layer.requires_grad_(trained)
    layer(torch.ones(1, 13, requires_grad=True)).sum().backward()
    assert layer.weight_gradient is None
    layer.collect_weight_gradient = True
    inputs = torch.randn(2, 4, 13, generator=torch.Generator().manual_seed(2))
    dense = layer.dequantize().detach().requires_grad_()
    gradients = []
    for x in inputs:
        layer(x).square().sum().backward()
        gradients += torch.autograd.grad(nn.functional.linear(x, dense, layer.bias).square().sum(), dense)
    expected = torch.stack([sum(gradients), sum(gradient.square() for gradient in gradients)])
    torch.testing.assert_close(layer.weight_gradient, expected)
    with torch.no_grad():
        layer(inputs[0])


def test_half_precision_module_computes_in_half_precision() -> None:
    layer, _ = _random_layer()
    expected = layer.dequantize()
    layer.to(torch.bfloat16)
    assert layer.codes.dtype == torch.uint8
    assert layer(torch.ones(1, 13, dtype=torch.bfloat16)).dtype == torch.bfloat16
    torch.testing.assert_close(layer.dequantize().float(), expected, rtol=0.02, atol=0.02)


def test_values_beyond_float16_are_an_error() -> None:
    layer, _ = _random_layer()
    with torch.no_grad():
        layer.scales[2] = 1e6
    with pytest.raises(NumericsError, match="1 of 5 values of scales"):
        layer.round_to_storage()


def test_odd_codebooks_are_refused() -> None:
    with pytest.raises(ConfigError, match="not 100"):
        AdditiveLinear(in_features=8, out_features=8, num_codebooks=1, entries=100)
