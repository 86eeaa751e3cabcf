"""QuIP# as a whole: exact costs, odd shapes, broken statistics, determinism, its loss against theory and others'."""

import math

import pytest
import torch
from torch import Tensor

from casp_pl.errors import ConfigError
from casp_pl.layers import build_layer
from casp_pl.layers.lattice_weight import dequantize_lattice_reference, lattice_quarters
from casp_pl.linalg.losses import relative_proxy_loss
from casp_pl.quantizers import AQLMQuantizer, QuIPSharpQuantizer, RTNQuantizer, quantize_low_rank

PAPER = {"search_scale": False, "fit_vectors": False, "candidate_runs": 1, "beam": 1}


def _problem(rows: int, columns: int, seed: int = 0, samples: int = 4) -> tuple[Tensor, Tensor]:
    """A weight and the second moment of correlated inputs, `samples` times as many as columns."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(samples * columns, columns, generator=generator) @ mixing
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    return weight, x.T @ x / len(x)


def _loss(layer: torch.nn.Module, weight: Tensor, moment: Tensor) -> float:
    return relative_proxy_loss(weight, layer.dequantize(), moment)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 8), (40, 67), (192, 32), (92, 200)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_any_shape_has_the_cost_and_the_spec_that_were_announced(shape: tuple[int, int], bits: int) -> None:
    weight, moment = _problem(*shape)
    quantizer = QuIPSharpQuantizer(sweeps=1)
    layer = quantizer.quantize(weight, moment, bits=bits, bias=torch.arange(float(shape[0])))
    assert layer.spec() == quantizer.layer_spec(*shape, bits=bits, bias=True)
    assert layer.storage_bits == quantizer.storage_bits(*shape, bits=bits)
    assert layer.code_bits == quantizer.code_bits(*shape, bits=bits)
    padded = 8 * math.ceil(shape[1] / 8)
    assert layer.storage_bits == bits * shape[0] * padded + 16 * sum(shape)
    assert _loss(layer, weight, moment) < 2.0 ** (-1.5 * bits)
    assert torch.equal(layer.bias, torch.arange(float(shape[0])))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_result_decodes_by_the_formula_and_survives_a_reload(bits: int) -> None:
    weight, moment = _problem(33, 52)
    layer = QuIPSharpQuantizer().quantize(weight, moment, bits=bits)
    formula = dequantize_lattice_reference(lattice_quarters(layer.codes, bits), layer.su, layer.sv, bits)
    torch.testing.assert_close(layer.dequantize(), formula)
    again = build_layer(layer.spec())
    state = layer.state_dict()
    again.load_state_dict({name: t.half() if t.is_floating_point() else t for name, t in state.items()})
    assert torch.equal(again.dequantize(), layer.dequantize())


def test_white_inputs_cost_what_the_codebook_costs() -> None:
    weight, _ = _problem(256, 256)
    layer = QuIPSharpQuantizer(**PAPER).quantize(weight, torch.eye(256), bits=2)
    assert _loss(layer, weight, torch.eye(256)) == pytest.approx(0.0912, rel=0.02)


def test_error_feedback_and_sweeps_pay() -> None:
    weight, moment = _problem(256, 256, samples=2)

    def loss(seen: Tensor, sweeps: int) -> float:
        return _loss(QuIPSharpQuantizer(**PAPER, sweeps=sweeps).quantize(weight, seen, bits=2), weight, moment)

    feedback, one, two = (loss(moment, sweeps) for sweeps in (0, 1, 2))
    assert loss(torch.eye(256), 0) == pytest.approx(0.0912, rel=0.03)
    assert feedback < 0.06
    assert feedback > 1.05 * one > 1.05 * 1.01 * two


@pytest.mark.slow
def test_a_large_case() -> None:
    weight, moment = _problem(1024, 1024, samples=2)
    losses = {}
    for name, seen, sweeps in (("nearest", torch.eye(1024), 0), ("feedback", moment, 0), ("swept", moment, 2)):
        layer = QuIPSharpQuantizer(**PAPER | {"sweeps": sweeps}).quantize(weight, seen, bits=2)
        losses[name] = _loss(layer, weight, moment)
    assert 0.088 < losses["nearest"] < 0.1
    assert losses["feedback"] < 0.053
    assert losses["swept"] < 0.92 * losses["feedback"]


def test_scale_search_vectors_and_sweeps_pay_on_a_weight_that_signs_cannot_make_gaussian() -> None:
    """A few large singular values, as in the first blocks of language models, leave long tails."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 128, generator=generator)
    weight += 5 * torch.randn(96, 3, generator=generator) @ torch.randn(3, 128, generator=generator)
    basis = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(5)))[0]
    moment = basis * torch.logspace(0, -2, 128) @ basis.T
    full = _loss(QuIPSharpQuantizer().quantize(weight, moment, bits=2), weight, moment)
    for without in ({"search_scale": False}, {"fit_vectors": False}, {"sweeps": 0}):
        less = _loss(QuIPSharpQuantizer(**without).quantize(weight, moment, bits=2), weight, moment)
        assert full < 0.98 * less, without


def test_more_bits_are_better_and_the_beam_pays() -> None:
    weight, moment = _problem(96, 64)
    losses = [_loss(QuIPSharpQuantizer().quantize(weight, moment, bits=bits), weight, moment) for bits in (2, 3, 4)]
    assert losses[0] > 2.5 * losses[1] > 2.5 * 3 * losses[2]
    narrow = QuIPSharpQuantizer(beam=1, candidate_runs=1)
    for bits in (3, 4):
        assert losses[bits - 2] < _loss(narrow.quantize(weight, moment, bits=bits), weight, moment)


def test_better_than_round_to_nearest_and_close_to_aqlm_at_no_more_bits() -> None:
    weight, moment = _problem(256, 128)
    ours, nearest, aqlm = (
        q().quantize(weight, moment, bits=2) for q in (QuIPSharpQuantizer, RTNQuantizer, AQLMQuantizer)
    )
    assert ours.bits_per_weight <= aqlm.bits_per_weight < nearest.bits_per_weight
    assert _loss(ours, weight, moment) < 0.4 * _loss(nearest, weight, moment)
    assert _loss(ours, weight, moment) < 1.15 * _loss(aqlm, weight, moment)


def test_outliers_do_no_harm() -> None:
    weight, moment = _problem(64, 128)
    spiked = weight.clone()
    spiked[3, 17], spiked[40, 2] = 0.5, -0.4
    usual, hard = (QuIPSharpQuantizer().quantize(w, moment, bits=2) for w in (weight, spiked))
    assert _loss(hard, spiked, moment) < 1.3 * _loss(usual, weight, moment)


def test_rows_and_weights_of_zeros_are_exact() -> None:
    weight, moment = _problem(12, 16)
    weight[[0, 7]] = 0
    layer = QuIPSharpQuantizer().quantize(weight, moment, bits=2)
    assert (layer.dequantize()[[0, 7]] == 0).all()
    assert _loss(layer, weight, moment) < 0.125
    assert (QuIPSharpQuantizer().quantize(torch.zeros(4, 16), moment, bits=2).dequantize() == 0).all()


def test_low_rank_factors_can_be_lattice_codes() -> None:
    weight, moment = _problem(64, 48)
    quantizer = QuIPSharpQuantizer()
    layer = quantize_low_rank(weight, moment, 40, quantizer, bits=4)
    exact = quantize_low_rank(weight, moment, 40, None)
    assert layer.spec()["input_factor"] == quantizer.layer_spec(40, 48, bits=4)
    assert _loss(layer, weight, moment) < _loss(exact, weight, moment) + 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": 0.0}, "damping"),
        ({"damping": float("nan")}, "damping"),
        ({"sweeps": -1}, "sweeps"),
        ({"candidate_runs": 3}, "candidate_runs"),
        ({"beam": 0}, "beam"),
    ],
)
def test_settings_that_cannot_work(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuIPSharpQuantizer(**settings)


@pytest.mark.parametrize("kind", ["identity", "diagonal"])
def test_signs_of_inputs_and_outputs_are_independent(kind: str) -> None:
    """Equal ones would cancel on a diagonal weight, which then is all but incoherent."""
    weight = torch.eye(64)
    if kind == "diagonal":
        weight *= torch.randn(64, generator=torch.Generator().manual_seed(0))
    rounded = QuIPSharpQuantizer().quantize(weight, torch.eye(64), bits=2).dequantize().detach()
    assert float((rounded - weight).square().sum() / weight.square().sum()) < 0.12
