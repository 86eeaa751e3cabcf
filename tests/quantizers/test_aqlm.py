"""AQLM as a whole: exact costs, odd shapes, broken statistics, determinism, and its loss against others'."""

import math

import pytest
import torch
from torch import Tensor

from casp_pl.errors import ConfigError
from casp_pl.kernels.additive import dequantize_additive_reference
from casp_pl.layers import build_layer
from casp_pl.linalg.losses import relative_proxy_loss
from casp_pl.quantizers import AQLMQuantizer, RTNQuantizer


def _problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the second moment of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator) @ mixing
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    return weight, x.T @ x / len(x)


def _loss(layer: torch.nn.Module, weight: Tensor, moment: Tensor) -> float:
    return relative_proxy_loss(weight, layer.dequantize(), moment)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 8), (40, 67), (192, 32), (64, 200)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_any_shape_has_the_cost_and_the_spec_that_were_announced(shape: tuple[int, int], bits: int) -> None:
    weight, moment = _problem(*shape)
    quantizer = AQLMQuantizer(kmeans_iterations=2, max_rounds=2)
    layer = quantizer.quantize(weight, moment, bits=bits, bias=torch.arange(float(shape[0])))
    assert layer.spec() == quantizer.layer_spec(*shape, bits=bits, bias=True)
    assert layer.storage_bits == quantizer.storage_bits(*shape, bits=bits)
    assert layer.code_bits == quantizer.code_bits(*shape, bits=bits)
    groups = math.ceil(shape[1] / layer.group_length)
    assert layer.code_bits == bits * shape[0] * groups * layer.group_length
    stored = [layer.codes, *(table.detach().half() for table in (layer.codebooks, layer.scales))]
    assert sum(t.numel() * t.element_size() for t in stored) == layer.nbytes
    assert _loss(layer, weight, moment) < 2.0 ** (-1.5 * bits)
    assert torch.equal(layer.bias, torch.arange(float(shape[0])))


def test_the_result_decodes_by_the_published_formula_and_survives_a_reload() -> None:
    weight, moment = _problem(32, 48)
    layer = AQLMQuantizer().quantize(weight, moment, bits=2)
    formula = dequantize_additive_reference(layer.codes_unpacked(), layer.codebooks, layer.scales)
    torch.testing.assert_close(layer.dequantize(), formula)
    again = build_layer(layer.spec())
    state = layer.state_dict().items()
    again.load_state_dict({name: t.half().float() if t.is_floating_point() else t for name, t in state})
    assert torch.equal(again.dequantize(), layer.dequantize())


def test_better_than_round_to_nearest_at_fewer_bits() -> None:
    weight, moment = _problem(256, 128)
    ours, nearest = AQLMQuantizer().quantize(weight, moment, bits=2), RTNQuantizer().quantize(weight, moment, bits=2)
    assert ours.bits_per_weight < nearest.bits_per_weight
    assert _loss(ours, weight, moment) < 0.4 * _loss(nearest, weight, moment)


def test_the_second_moment_and_every_stage_pay() -> None:
    weight, moment = _problem(128, 96)
    formats = {2: [[2, 16, 4]]}

    def loss(seen: Tensor = moment, **settings: int) -> float:
        return _loss(AQLMQuantizer(formats=formats, **settings).quantize(weight, seen, bits=2), weight, moment)

    full = loss()
    assert full < 0.8 * loss(torch.eye(96))
    assert full < 0.98 * loss(max_rounds=1)
    assert full < 0.95 * loss(feedback_beam=1, sweep_beam=1)


def test_codebooks_fitted_to_a_sample_of_rows_are_as_good() -> None:
    weight, moment = _problem(1600, 40)
    formats = {2: [[2, 16, 4]]}  # 128 numbers: 512 of the 1600 rows have 160 weights for each
    losses = [
        _loss(AQLMQuantizer(formats=formats, fit_weights=enough).quantize(weight, moment, bits=2), weight, moment)
        for enough in (1, 1000)
    ]
    assert losses[0] != losses[1], "a sample was taken"
    assert losses[0] < 1.005 * losses[1]


def test_more_bits_are_better() -> None:
    weight, moment = _problem(96, 64)
    losses = [_loss(AQLMQuantizer().quantize(weight, moment, bits=bits), weight, moment) for bits in (2, 3, 4)]
    assert losses[0] > 2.5 * losses[1] > 6 * losses[2]


def test_rows_and_weights_of_zeros_are_exact() -> None:
    weight, moment = _problem(12, 16)
    weight[[0, 7]] = 0
    approx = AQLMQuantizer().quantize(weight, moment, bits=2).dequantize()
    assert (approx[[0, 7]] == 0).all()
    assert _loss(AQLMQuantizer().quantize(weight, moment, bits=2), weight, moment) < 0.125
    assert (AQLMQuantizer().quantize(torch.zeros(4, 16), moment, bits=2).dequantize() == 0).all()


def test_codebooks_shrink_with_the_matrix_and_stay_below_their_bound() -> None:
    quantizer = AQLMQuantizer(max_codebook_overhead=0.15)
    sizes = []
    for rows in (8, 64, 192, 576, 4096):
        codes, total = (f(rows, 576, bits=2) for f in (quantizer.code_bits, quantizer.storage_bits))
        assert codes == 2 * rows * 576
        assert total - codes - 16 * rows <= 0.15 * rows * 576
        sizes.append(total - codes - 16 * rows)
    assert sizes == sorted(sizes)
    assert quantizer.layer_spec(4096, 4096, bits=2)["entries"] == 256


def test_formats_can_be_forced() -> None:
    quantizer = AQLMQuantizer(formats={2: [[2, 256, 8]]})
    spec = quantizer.layer_spec(8, 16, bits=2)
    assert (spec["num_codebooks"], spec["entries"], spec["group_length"]) == (2, 256, 8)
    weight, moment = _problem(8, 16)
    assert quantizer.quantize(weight, moment, bits=2).spec() == spec


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"formats": {2: [[2, 256, 4]]}}, "costs 4 bits a weight, not 2"),
        ({"formats": {2: [[2, 100, 8]]}}, "256 entries, not 100"),
        ({"formats": {2: [[2, 256]]}}, "codebooks, entries, group length"),
        ({"formats": {5: [[5, 256, 8]]}}, "levels"),
        ({"formats": {2: []}}, "at least one"),
        ({"damping": 0.0}, "damping"),
        ({"damping": float("nan")}, "damping"),
        ({"sweep_beam": 3}, "sweep_beam"),
        ({"max_rounds": 0}, "max_rounds"),
        ({"fit_rows": 0}, "fit_rows"),
        ({"fit_weights": 0}, "fit_weights"),
        ({"kmeans_iterations": -1}, "kmeans_iterations"),
    ],
)
def test_settings_that_cannot_work(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AQLMQuantizer(**settings)
