"""UniformLinear: what it computes, stores and counts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from casp_pl.errors import ConfigError
from casp_pl.layers import UniformLinear, build_layer

SETTINGS = [(5, 13, 2, 4), (3, 64, 3, 64), (4, 7, 4, 64), (2, 9, 8, 1)]


def _random_layer(rows: int, columns: int, bits: int, group_size: int) -> tuple[UniformLinear, Tensor]:
    """A layer and its dense weight by hand."""
    generator = torch.Generator().manual_seed(rows)
    groups = -(-columns // group_size)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    zeros = torch.randint(0, 2**bits, (rows, groups), generator=generator)
    scales = torch.rand(rows, groups, generator=generator) + 0.5
    bias = torch.randn(rows, generator=generator)
    layer = UniformLinear.from_codes(codes, zeros, scales, bits=bits, group_size=group_size, bias=bias)
    group = torch.arange(columns) // group_size
    return layer, (codes - zeros[:, group]) * scales[:, group]


@pytest.mark.parametrize("settings", SETTINGS)
def test_computes_and_trains_as_the_dense_weight(settings: tuple[int, int, int, int]) -> None:
    layer, weight = _random_layer(*settings)
    torch.testing.assert_close(layer.dequantize(), weight)
    x = torch.randn(2, 3, settings[1], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))
    layer.dequantize().sum().backward()
    steps = (
        layer.codes_unpacked().int() - layer.zeros_unpacked().int().repeat_interleave(settings[3], 1)[:, : settings[1]]
    )
    padded = nn.functional.pad(steps, (0, -settings[1] % settings[3]))
    torch.testing.assert_close(layer.scales.grad, padded.view(*layer.scales.shape, -1).sum(-1).float())


@pytest.mark.parametrize("settings", SETTINGS)
def test_bytes_in_a_file_equal_the_reported_bits(settings: tuple[int, int, int, int], tmp_path: Path) -> None:
    layer, _ = _random_layer(*settings)
    layer.round_to_storage()
    state = {
        name: v if v.dtype == torch.uint8 else v.half() for name, v in layer.state_dict().items() if name != "bias"
    }
    save_file(state, tmp_path / "layer.safetensors")
    read = load_file(tmp_path / "layer.safetensors")
    assert sum(value.numel() * value.element_size() for value in read.values()) == layer.nbytes
    assert layer.code_bits == settings[0] * settings[1] * settings[2]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_reload_from_float16_is_bit_equal(settings: tuple[int, int, int, int]) -> None:
    layer, _ = _random_layer(*settings)
    layer.round_to_storage()
    stored = {name: value.half() if name == "scales" else value for name, value in layer.state_dict().items()}
    again = build_layer(layer.spec())
    assert not again.dequantize().any()
    again.load_state_dict(stored)
    assert torch.equal(again.dequantize(), layer.dequantize())
    assert again.spec() == layer.spec()


def test_set_codes_and_new_zeros_take_effect_at_once() -> None:
    layer, _ = _random_layer(5, 13, 2, 4)
    layer.dequantize()
    layer.set_codes(torch.full((5, 13), 3))
    with torch.no_grad():
        layer.zeros.zero_()
    expected = 3 * layer.scales.repeat_interleave(4, 1)[:, :13]
    torch.testing.assert_close(layer.dequantize(), expected)
    with pytest.raises(ValueError, match="has codes"):
        layer.set_codes(torch.zeros(5, 12))


@pytest.mark.parametrize(("bits", "group_size"), [(0, 64), (9, 64), (2, 0)])
def test_impossible_settings_are_refused(bits: int, group_size: int) -> None:
    with pytest.raises(ConfigError, match="1 to 8 bits"):
        UniformLinear(in_features=8, out_features=8, bits=bits, group_size=group_size)
