"""LatticeLinear: what it computes, stores and counts."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from casp_pl.errors import ConfigError, NumericsError
from casp_pl.kernels.lattice import LATTICE_STAGES
from casp_pl.layers import LatticeLinear, build_layer, materialized
from casp_pl.layers.lattice_weight import (
    dequantize_lattice,
    dequantize_lattice_reference,
    lattice_points,
    lattice_quarters,
)
from casp_pl.linalg.orthogonal import transform_matrix

SHAPES = [(6, 16, 2), (5, 13, 3), (7, 40, 4), (3, 1, 2), (1, 24, 3)]


def _random_layer(shape: tuple[int, int, int] = SHAPES[1], *, bias: bool = True) -> tuple[LatticeLinear, Tensor]:
    """A layer and its codes (S, O, G)."""
    rows, columns, bits = shape
    generator = torch.Generator().manual_seed(rows)
    groups = -(-columns // 8)
    codes = torch.stack(
        [torch.randint(1 << 8 * s.num_bytes, (rows, groups), generator=generator) for s in LATTICE_STAGES[bits]]
    )
    vectors = [torch.randn(n, generator=generator) for n in (columns, rows, rows)]
    return LatticeLinear.from_codes(codes, *vectors[:2], bits=bits, bias=vectors[2] if bias else None), codes


def _formula(layer: LatticeLinear) -> Tensor:
    return dequantize_lattice_reference(lattice_quarters(layer.codes, layer.bits), layer.su, layer.sv, layer.bits)


@pytest.mark.parametrize("shape", SHAPES)
def test_computes_with_the_formula(shape: tuple[int, int, int]) -> None:
    layer, codes = _random_layer(shape)
    torch.testing.assert_close(layer.dequantize(), _formula(layer), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.codes_unpacked(), codes)
    x = torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, _formula(layer), layer.bias), rtol=1e-4, atol=1e-4)
    with materialized(layer):
        torch.testing.assert_close(layer(x), nn.functional.linear(x, _formula(layer), layer.bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", LATTICE_STAGES)
def test_points_are_decoded_alike_by_torch_and_by_a_loop(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, codes = _random_layer((67, 48, bits))
    stages = zip(LATTICE_STAGES[bits], codes, strict=True)
    formula = sum(stage.points(codes.device)[own].flatten(1).double() / (4 * stage.scale) for stage, own in stages)
    first = lattice_points(layer.codes, torch.float32)
    torch.testing.assert_close(first.double(), formula, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr("casp_pl.layers.lattice_weight.weight_loops", lambda *_: None)
    torch.testing.assert_close(lattice_points(layer.codes, torch.float32), first, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lattice_points(layer.codes, torch.float64), formula, rtol=1e-14, atol=1e-14)


def test_transforms_applied_to_the_activations_give_the_same_outputs() -> None:
    """y = sv * U_O^T Z U_P (su * x, padded with zeros): the weight is never formed."""
    layer, _ = _random_layer()
    x = torch.randn(4, 13, dtype=torch.float64)
    left, right = transform_matrix(5), transform_matrix(16)
    first, second = lattice_quarters(layer.codes, 3).double() / 4
    points = first + second / LATTICE_STAGES[3][1].scale
    mixed = nn.functional.pad(x * layer.su.double(), (0, 3)) @ right.T
    expected = mixed @ points.T @ left * layer.sv.double() + layer.bias.double()
    torch.testing.assert_close(layer(x.float()).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_pass_gradcheck(shape: tuple[int, int, int]) -> None:
    layer, _ = _random_layer(shape)
    quarters = lattice_quarters(layer.codes, layer.bits)
    vectors = [v.detach().double().requires_grad_() for v in (layer.su, layer.sv)]
    assert torch.autograd.gradcheck(lambda su, sv: dequantize_lattice(layer.codes, su, sv), vectors)
    wanted = torch.autograd.grad(dequantize_lattice_reference(quarters, *vectors, shape[2]).square().sum(), vectors)
    found = torch.autograd.grad(dequantize_lattice(layer.codes, *vectors).square().sum(), vectors)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_through_the_transforms_equal_those_of_the_dense_formula(
    shape: tuple[int, int, int], bias: bool
) -> None:
    layer, _ = _random_layer(shape, bias=bias)
    layer = layer.double()
    x = torch.randn(9, shape[1], dtype=torch.float64, requires_grad=True)
    tensors = [x, layer.su, layer.sv, *([] if layer.bias is None else [layer.bias])]
    wanted = torch.autograd.grad(nn.functional.linear(x, _formula(layer), layer.bias).square().sum(), tensors)
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), tensors), wanted)


def test_training_in_16_bits_keeps_inputs_and_narrow_products() -> None:
    """Transformed, in float32, they would be twice as large."""
    layer = LatticeLinear(in_features=64, out_features=96, bits=2)
    with torch.no_grad():
        layer.su.fill_(1)
        layer.sv.fill_(0.1)
        layer.codes.random_(0, 256)
    x, kept = torch.randn(50, 64), {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters(), *layer.buffers())}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
        y = layer(x)
    beside = {
        (tuple(tensor.shape), tensor.dtype)
        for place, tensor in kept.items()
        if place not in own and len(tensor) == 50 and tensor.stride(0)  # not a factor of a transform, for every token
    }
    assert beside == {((50, 96), torch.bfloat16)}
    exact, weights = layer(x), torch.randn(50, 96)
    found, wanted = (torch.autograd.grad((made * weights).sum(), [layer.su, layer.sv]) for made in (y, exact))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_bytes_in_a_file_equal_the_reported_bits(shape: tuple[int, int, int], bias: bool, tmp_path: Path) -> None:
    layer, _ = _random_layer(shape, bias=bias)
    layer.round_to_storage()
    state = {
        name: value if value.dtype == torch.uint8 else value.half()
        for name, value in layer.state_dict().items()
        if name != "bias"
    }
    save_file(state, tmp_path / "layer.safetensors")
    read = load_file(tmp_path / "layer.safetensors")
    assert sum(value.numel() * value.element_size() for value in read.values()) == layer.nbytes
    rows, columns, bits = shape
    padded = -(-columns // 8) * 8
    assert layer.code_bits == bits * rows * padded
    assert layer.storage_bits == bits * rows * padded + 16 * (rows + columns)
    assert layer.bits_per_weight == layer.storage_bits / (rows * columns)


def test_a_reload_from_float16_is_bit_equal_and_replaces_the_codes() -> None:
    layer, _ = _random_layer()
    layer.round_to_storage()
    stored = {
        name: v.half() if v.is_floating_point() and name != "bias" else v for name, v in layer.state_dict().items()
    }
    assert set(stored) == {"codes", "su", "sv", "bias"}
    again = build_layer(layer.spec())
    assert not again.dequantize().any()  # fills the cache with codes of zero
    again.load_state_dict(stored)
    assert torch.equal(again.dequantize(), layer.dequantize())
    assert again.spec() == layer.spec()


def test_set_codes_takes_effect_at_once_and_elsewhere_not() -> None:
    layer, codes = _random_layer()
    twin = copy.deepcopy(layer)
    before = layer.dequantize()
    layer.set_codes((codes + 1) % 256)
    torch.testing.assert_close(layer.dequantize(), _formula(layer), rtol=1e-5, atol=1e-5)
    assert not torch.equal(layer.dequantize(), before)
    assert torch.equal(twin.dequantize(), before)
    with pytest.raises(ValueError, match="has codes"):
        layer.set_codes(codes[:, :1])
    with pytest.raises(ValueError, match="no points of e8"):
        layer.set_codes(codes + 256)


def test_training_moves_the_vectors_after_inference_mode() -> None:
    layer, _ = _random_layer()
    x = torch.ones(40, 13)  # more than are looked up: one path in both modes
    with torch.inference_mode():
        expected = layer(x).clone()
    output = layer(x)
    output.square().sum().backward()
    assert torch.equal(output.detach(), expected)
    assert set(layer.tables()) == {"su", "sv"}
    assert all(table.grad.abs().min() > 0 for table in layer.tables().values())


@pytest.mark.parametrize("trained", [True, False])
def test_gradient_of_the_weight_is_collected(trained: bool) -> None:
    layer, _ = _random_layer()
    layer.requires_grad_(trained)
    layer.collect_weight_gradient = True
    x = torch.randn(4, 13, generator=torch.Generator().manual_seed(2))
    dense = layer.dequantize().detach().requires_grad_()
    layer(x).square().sum().backward()
    nn.functional.linear(x, dense, layer.bias).square().sum().backward()
    assert dense.grad is not None
    torch.testing.assert_close(layer.weight_gradient, torch.stack([dense.grad, dense.grad.square()]))


def test_half_precision_module_computes_in_half_precision() -> None:
    layer, _ = _random_layer()
    expected = layer.dequantize()
    layer.to(torch.bfloat16)
    assert layer.codes.dtype == torch.uint8
    assert layer(torch.ones(1, 13, dtype=torch.bfloat16)).dtype == torch.bfloat16
    torch.testing.assert_close(layer.dequantize().float(), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("how", ["tables in float16", "autocast", "tables in float32"])
@pytest.mark.parametrize("tokens", [1, 65])
def test_large_outputs_are_finite_in_float16(tokens: int, how: str) -> None:
    layer, _ = _random_layer((256, 48, 2))
    layer.requires_grad_(False)
    layer.su.sign_()
    layer.sv.sign_().mul_(0.02)  # before they are scaled, outputs are fifty times as large
    large = layer.dequantize()[5]
    x = (2000 * large / large.square().sum()).expand(tokens, -1)
    layer = layer.half() if how == "tables in float16" else layer
    wanted = nn.functional.linear(x.double(), layer.dequantize().double(), layer.bias.double())
    assert wanted[0, 5] == pytest.approx(2000, rel=0.01)
    with torch.autocast("cpu", torch.float16, enabled=how == "autocast"):
        y = layer(x if how == "autocast" else x.half())
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), wanted, rtol=0.01, atol=10)


def test_values_beyond_float16_are_an_error() -> None:
    layer, _ = _random_layer()
    with torch.no_grad():
        layer.sv[2] = 1e6
    with pytest.raises(NumericsError, match="1 of 5 values of sv"):
        layer.round_to_storage()


def test_other_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="2, 3, 4 bits, not 5"):
        LatticeLinear(in_features=8, out_features=8, bits=5)
