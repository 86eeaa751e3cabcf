"""UniformLinear: what it computes, stores and counts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from casp_pl.errors import ConfigError, IntegrityError
from casp_pl.kernels.packing import pack_wide
from casp_pl.layers import UniformLinear, build_layer

Settings = tuple[int, int, int, int, bool]  # rows, columns, bits, group size, regrouped
RUNS = [(5, 13, 2, 4, False), (3, 64, 3, 64, False), (4, 7, 4, 64, False), (2, 9, 8, 1, False)]
REGROUPED = [(5, 13, 2, 4, True), (3, 5, 3, 8, True), (2, 300, 2, 1, True)]
SETTINGS = RUNS + REGROUPED


def _groups(columns: int, group_size: int, regrouped: bool) -> Tensor:
    runs = torch.arange(columns) // group_size
    return runs[torch.randperm(columns, generator=torch.Generator().manual_seed(7))] if regrouped else runs


def _random_layer(rows: int, columns: int, bits: int, group_size: int, regrouped: bool) -> tuple[UniformLinear, Tensor]:
    """A layer and its dense weight by hand."""
    generator = torch.Generator().manual_seed(rows)
    groups = -(-columns // group_size)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    zeros = torch.randint(0, 2**bits, (rows, groups), generator=generator)
    scales = torch.rand(rows, groups, generator=generator) + 0.5
    bias = torch.randn(rows, generator=generator)
    group = _groups(columns, group_size, regrouped)
    layer = UniformLinear.from_codes(
        codes,
        zeros,
        scales,
        bits=bits,
        group_size=group_size,
        column_groups=group if regrouped else None,
        bias=bias,
    )
    return layer, (codes - zeros[:, group]) * scales[:, group]


@pytest.mark.parametrize("settings", SETTINGS)
def test_computes_and_trains_as_the_dense_weight(settings: Settings) -> None:
    layer, weight = _random_layer(*settings)
    torch.testing.assert_close(layer.dequantize(), weight)
    x = torch.randn(2, 3, settings[1], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))
    pull = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    (layer.dequantize() * pull).sum().backward()
    group = _groups(settings[1], *settings[3:])
    steps = weight / layer.scales.detach()[:, group]
    expected = torch.zeros_like(layer.scales).index_add(1, group, steps * pull)
    torch.testing.assert_close(layer.scales.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", SETTINGS)
def test_bytes_in_a_file_equal_the_reported_bits(settings: Settings, tmp_path: Path) -> None:
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
def test_a_reload_from_float16_is_bit_equal(settings: Settings) -> None:
    layer, _ = _random_layer(*settings)
    layer.round_to_storage()
    stored = {name: value.half() if name == "scales" else value for name, value in layer.state_dict().items()}
    again = build_layer(layer.spec())
    assert not again.dequantize().any()
    again.load_state_dict(stored)
    assert torch.equal(again.dequantize(), layer.dequantize())
    assert again.spec() == layer.spec()


def test_set_codes_and_new_zeros_take_effect_at_once() -> None:
    layer, _ = _random_layer(5, 13, 2, 4, False)
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


def test_groups_of_columns_cost_their_bits_and_are_announced() -> None:
    runs, regrouped = (
        UniformLinear(in_features=300, out_features=2, bits=2, group_size=1, regrouped=r) for r in (0, 1)
    )
    assert regrouped.storage_bits - runs.storage_bits == 8 * (300 + 38)  # 9 bits a column: a byte, and 300 bits
    assert "regrouped" not in runs.spec()
    assert regrouped.spec() == {**runs.spec(), "regrouped": True}
    skeleton = build_layer(regrouped.spec(), device="meta")
    assert skeleton.column_groups.is_meta
    assert skeleton.storage_bits == regrouped.storage_bits
    assert torch.equal(regrouped.column_groups_unpacked(), torch.arange(300))


def test_new_groups_take_effect_at_once() -> None:
    layer, _ = _random_layer(5, 13, 2, 4, True)
    other, _ = _random_layer(5, 13, 2, 4, False)
    before = layer.dequantize()
    swapped = _groups(13, 4, True).flip(0)
    layer.column_groups.copy_(pack_wide(swapped, 2))
    assert not torch.equal(layer.dequantize(), before)
    expected = (layer.codes_unpacked().float() - layer.zeros_unpacked()[:, swapped]) * layer.scales[:, swapped]
    torch.testing.assert_close(layer.dequantize(), expected)
    assert torch.equal(layer.codes, other.codes)


@pytest.mark.parametrize("groups", [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 3, 3], [2, 2, 2, 2, 2, 2]])
def test_groups_that_are_none_are_refused(groups: list[int]) -> None:
    layer = UniformLinear(in_features=6, out_features=3, bits=2, group_size=2, regrouped=True)
    layer.column_groups.copy_(pack_wide(torch.tensor(groups), 2))
    with pytest.raises(IntegrityError, match="groups of 2"):
        layer(torch.ones(1, 6))
