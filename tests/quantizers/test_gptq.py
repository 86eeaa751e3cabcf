"""GPTQ as a whole: exact costs, odd shapes, broken statistics, determinism, and its loss against others'."""

import itertools
import logging

import pytest
import torch
from torch import Tensor

from casp_pl.errors import ConfigError
from casp_pl.layers import UniformLinear, build_layer
from casp_pl.linalg.losses import relative_proxy_loss
from casp_pl.modules.parameters import trainable_parameters
from casp_pl.quantizers import GPTQQuantizer, RTNQuantizer, quantize_low_rank
from casp_pl.quantizers.gptq_codes import ordered_feedback
from casp_pl.quantizers.low_rank import low_rank_spec, low_rank_storage_bits

OPTIONS = [
    {"order": order, "static_groups": static, "scale_search": search}
    for order, static, search in itertools.product(("none", "activation", "group_aware"), (False, True), (False, True))
]


def _problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the second moment of strongly correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    loudness = torch.exp(0.7 * torch.randn(columns, generator=generator))
    x = torch.randn(4 * columns, columns, generator=generator) @ mixing * loudness
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    return weight, x.T @ x / len(x)


def _loss(layer: UniformLinear, weight: Tensor, moment: Tensor) -> float:
    return relative_proxy_loss(weight, layer.dequantize(), moment)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 8), (40, 67), (10, 200)])
def test_any_shape_has_the_cost_and_the_spec_that_were_announced(shape: tuple[int, int], options: dict) -> None:
    weight, moment = _problem(*shape)
    quantizer = GPTQQuantizer(group_size=16, **options)
    for bits in quantizer.levels:
        layer = quantizer.quantize(weight, moment, bits=bits, bias=torch.arange(float(shape[0])))
        assert layer.spec() == quantizer.layer_spec(*shape, bits=bits, bias=True)
        assert layer.storage_bits == quantizer.storage_bits(*shape, bits=bits)
        assert layer.code_bits == quantizer.code_bits(*shape, bits=bits) == bits * shape[0] * shape[1]
        stored = [layer.codes, layer.zeros, layer.scales.detach().half()]
        stored += [] if layer.column_groups is None else [layer.column_groups]
        assert sum(t.numel() * t.element_size() for t in stored) == layer.nbytes
        assert torch.equal(layer.bias, torch.arange(float(shape[0])))
        again = build_layer(layer.spec())
        again.load_state_dict({k: t.half() if t.is_floating_point() else t for k, t in layer.state_dict().items()})
        assert torch.equal(again.dequantize(), layer.dequantize())
    assert _loss(layer, weight, moment) < 1e-3  # 8 bits


def test_two_bits_cost_what_the_docstring_says() -> None:
    quantizer = GPTQQuantizer(order="group_aware")
    assert quantizer.storage_bits(576, 576, bits=2) / 576**2 == pytest.approx(2.28, abs=0.005)
    assert GPTQQuantizer().storage_bits(576, 576, bits=2) - quantizer.storage_bits(576, 576, bits=2) == 4 * 576
    assert GPTQQuantizer().storage_bits(576, 64, bits=2) == quantizer.storage_bits(576, 64, bits=2)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_better_than_round_to_nearest_at_equal_bits(bits: int, options: dict) -> None:
    weight, moment = _problem(96, 128)
    nearest = RTNQuantizer().quantize(weight, moment, bits=bits)
    ours = GPTQQuantizer(**options).quantize(weight, moment, bits=bits)
    assert ours.code_bits == nearest.code_bits
    expected = 0.5 if options["scale_search"] else 0.9
    assert _loss(ours, weight, moment) < expected * _loss(nearest, weight, moment)


def test_every_default_pays() -> None:
    weight, moment = _problem(96, 256)

    def loss(**settings: object) -> float:
        return _loss(GPTQQuantizer(**settings).quantize(weight, moment, bits=2), weight, moment)

    best = loss()
    assert best < 0.8 * loss(scale_search=False)
    assert best < 0.97 * loss(static_groups=True)
    assert best < 0.97 * loss(order="group_aware") < 0.97 * 0.97 * loss(order="none")
    assert best < 0.97 * loss(group_size=256)


def test_more_bits_are_better() -> None:
    weight, moment = _problem(48, 96)
    losses = [_loss(GPTQQuantizer().quantize(weight, moment, bits=bits), weight, moment) for bits in (2, 3, 4, 8)]
    assert losses[0] > 3 * losses[1] > 9 * losses[2] > 900 * losses[3]


@pytest.mark.parametrize("options", OPTIONS)
def test_same_input_same_result_whatever_is_done_between(options: dict) -> None:
    weight, moment = _problem(24, 40)
    other, other_moment = _problem(8, 24, seed=1)
    kept, state = (weight.clone(), moment.clone()), torch.get_rng_state()
    quantizer = GPTQQuantizer(group_size=16, **options)
    first = quantizer.quantize(weight, moment, bits=2)
    quantizer.quantize(other, other_moment, bits=3)
    generator = torch.Generator().manual_seed(5)
    second = quantizer.quantize(weight, moment, bits=2, generator=generator)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert (first.bits, first.code_bits) == (2, 2 * 24 * 40)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weight, kept[0])
    assert torch.equal(moment, kept[1])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["zero", "rank one", "dead columns", "indefinite", "huge", "tiny"])
def test_poor_second_moments_give_a_finite_layer(name: str, options: dict) -> None:
    weight, moment = _problem(32, 20)
    alive = torch.arange(20) % 3 > 0
    poor = {
        "zero": torch.zeros(20, 20),
        "rank one": torch.ones(20, 20),
        "dead columns": moment * alive * alive[:, None],
        "indefinite": moment - 0.5 * moment.diagonal().mean() * torch.eye(20),
        "huge": 1e12 * moment,
        "tiny": 1e-12 * moment,
    }[name]
    quantizer = GPTQQuantizer(group_size=8, **options)
    approx = quantizer.quantize(weight, poor, bits=2).dequantize()
    assert approx.isfinite().all()
    assert relative_proxy_loss(weight, approx, poor) < 0.5 or name == "indefinite"
    if name in ("huge", "tiny"):
        torch.testing.assert_close(approx, quantizer.quantize(weight, moment, bits=2).dequantize())


@pytest.mark.parametrize("order", ["none", "activation", "group_aware"])
def test_without_second_moment_it_is_round_to_nearest(order: str) -> None:
    weight, _ = _problem(6, 70)
    nearest = RTNQuantizer().quantize(weight, torch.eye(70), bits=3).dequantize()
    for moment in (torch.zeros(70, 70), torch.eye(70)):
        layer = GPTQQuantizer(order=order, scale_search=False).quantize(weight, moment, bits=3)
        assert torch.equal(layer.dequantize(), nearest)


@pytest.mark.parametrize("options", OPTIONS)
def test_weights_of_dead_columns_do_not_cost_the_others(options: dict) -> None:
    weight, moment = _problem(12, 40)
    moment[[3, 17]] = 0
    moment[:, [3, 17]] = 0
    loud, silent = weight.clone(), weight.clone()
    loud[:, [3, 17]], silent[:, [3, 17]] = 50.0, 0.0
    quantizer = GPTQQuantizer(group_size=8, **options)
    first, second = (quantizer.quantize(w, moment, bits=2).dequantize() for w in (loud, silent))
    alive = [i for i in range(40) if i not in (3, 17)]
    assert torch.equal(first[:, alive], second[:, alive])
    assert (second[:, [3, 17]] == 0).all()
    assert first.isfinite().all()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(1, 6, 3), (7, 25, 8), (5, 65, 16), (4, 31, 5)])
def test_dead_columns_become_zero(rows: int, columns: int, group_size: int, options: dict) -> None:
    """A whole group of them, the short last one, and some among others; the rest as if those weights had been 0."""
    weight, moment = _problem(rows, columns)
    dead = torch.zeros(columns, dtype=torch.bool)
    dead[:group_size], dead[-1], dead[columns // 2] = True, columns % group_size == 1, True
    alive = ~dead
    moment = moment * alive * alive[:, None]
    quantizer = GPTQQuantizer(group_size=group_size, **options)
    for bits in (2, 3):
        layer = quantizer.quantize(weight + 7 * dead, moment, bits=bits)
        assert (layer.dequantize()[:, dead] == 0).all()
        without = quantizer.quantize(weight * alive, moment, bits=bits)
        for name, tensor in without.state_dict().items():
            assert torch.equal(layer.state_dict()[name], tensor)
        assert layer.dequantize()[:, alive].count_nonzero() > 0


@pytest.mark.parametrize("order", ["none", "activation", "group_aware"])
def test_group_sizes_by_name(order: str) -> None:
    """Each linear as a quantizer with that one group size makes it; the last part that fits counts."""
    quantizer = GPTQQuantizer(order=order, group_size=16, group_sizes={"down_proj": 24, ".layers.0.": 5, "q_proj": 16})
    sizes = {
        "model.layers.1.mlp.down_proj": 24,
        "model.layers.0.mlp.down_proj": 5,
        "model.layers.10.mlp.up_proj": 16,
        "model.layers.0.self_attn.q_proj": 16,
        "model.layers.1.mlp.down_proj_extra": 16,
    }
    weight, moment = _problem(9, 43)
    for name, size in sizes.items():
        own, plain = quantizer.for_module(name), GPTQQuantizer(order=order, group_size=size)
        assert own is quantizer.for_module(name)
        assert own.for_module(name) is own
        layer, expected = (each.quantize(weight, moment, bits=3) for each in (own, plain))
        assert layer.spec() == expected.spec() == own.layer_spec(9, 43, bits=3)
        for key, tensor in expected.state_dict().items():
            assert torch.equal(layer.state_dict()[key], tensor)
        assert layer.storage_bits == own.storage_bits(9, 43, bits=3)
        product = quantize_low_rank(weight, moment, 8, own, bits=2)
        assert product.spec() == low_rank_spec(9, 43, 8, own, bits=2)
        assert product.storage_bits == low_rank_storage_bits(9, 43, 8, own, bits=2)
    assert quantizer.for_module("model.layers.5.mlp.up_proj") is quantizer
    quantizer.check_names(list(sizes))
    with pytest.raises(
        ConfigError, match=r"quantizer.group_sizes: no linear has 'layers.0' in its name; one is called"
    ):
        GPTQQuantizer(group_sizes={"layers.0": 8}).check_names(["model.layers.00.mlp.up_proj"])


def test_linears_of_one_input_share_its_factorisation_whatever_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(moment: Tensor, group_size: int, *settings: object) -> object:
        made.append(group_size)
        return ordered_feedback(moment, group_size, *settings)

    monkeypatch.setattr("casp_pl.quantizers.gptq.ordered_feedback", counted)
    weight, moment = _problem(6, 20)
    quantizer = GPTQQuantizer(group_size=4, group_sizes={"v_proj": 8, "k_proj": 8, "o_proj": 4})
    for name in ("q_proj", "o_proj", "k_proj", "v_proj"):
        quantizer.for_module(name).quantize(weight, moment, bits=2)
    assert made == [4, 8]


def test_damping_is_raised_where_it_is_not_enough(caplog: pytest.LogCaptureFixture) -> None:
    weight, _ = _problem(6, 10)
    rank_one = torch.ones(10, 10)
    with caplog.at_level(logging.WARNING):
        layer = GPTQQuantizer(damping=0.0).quantize(weight, rank_one, bits=2)
    assert "needed damping" in caplog.text
    assert layer.dequantize().isfinite().all()


def test_rows_and_weights_of_zeros_are_exact() -> None:
    weight, moment = _problem(12, 16)
    weight[[0, 7]] = 0
    assert (GPTQQuantizer().quantize(weight, moment, bits=2).dequantize()[[0, 7]] == 0).all()
    assert (GPTQQuantizer().quantize(torch.zeros(4, 16), moment, bits=2).dequantize() == 0).all()


@pytest.mark.parametrize("factor", [1e-3, 1e4])
def test_weights_of_unusual_size_survive_float16(factor: float) -> None:
    weight, moment = _problem(32, 24)
    usual = _loss(GPTQQuantizer().quantize(weight, moment, bits=2), weight, moment)
    layer = GPTQQuantizer().quantize(factor * weight, moment, bits=2)
    assert _loss(layer, factor * weight, moment) < 1.1 * usual


def test_low_precision_inputs_are_computed_in_float32() -> None:
    weight, moment = _problem(24, 16)
    layer = GPTQQuantizer().quantize(weight.bfloat16(), moment.double(), bits=3)
    expected = GPTQQuantizer().quantize(weight.bfloat16().float(), moment, bits=3)
    assert layer.scales.dtype == torch.float32
    assert torch.equal(layer.dequantize(), expected.dequantize())


def test_rounding_to_storage_changes_nothing_and_scales_can_be_tuned() -> None:
    weight, moment = _problem(24, 40)
    layer = GPTQQuantizer(group_size=16).quantize(weight, moment, bits=2)
    before = layer.dequantize().detach()
    layer.round_to_storage()
    assert torch.equal(layer.dequantize(), before)
    (scales,) = trainable_parameters(layer)
    assert scales is layer.tables()["scales"]
    optimizer, start = torch.optim.Adam([scales], lr=1e-4), _loss(layer, weight, moment)
    for _ in range(20):
        error = layer.dequantize() - weight
        optimizer.zero_grad()
        ((error @ moment) * error).sum().backward()
        optimizer.step()
    assert _loss(layer, weight, moment) < 0.99 * start


def test_factors_of_low_rank_keep_their_bits() -> None:
    weight, moment = _problem(48, 72)
    layer = quantize_low_rank(weight, moment, 24, GPTQQuantizer(group_size=16), bits=3)
    assert layer.code_bits == 3 * 24 * (48 + 72)
    exact = quantize_low_rank(weight, moment, 24, None)
    loss = relative_proxy_loss(weight, layer.dequantize(), moment)
    assert loss < relative_proxy_loss(weight, exact.dequantize(), moment) + 0.05
    assert torch.equal(build_layer(layer.spec()).input_factor.scales, torch.zeros(24, 5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 0}, "group_size must be at least 1, not 0"),
        ({"group_sizes": {"down_proj": 8, "up_proj": 0}}, "group_sizes must be at least 1, not 0 for 'up_proj'"),
        ({"order": "random"}, "one of none, activation, group_aware, not random"),
        ({"damping": -0.1}, "damping"),
        ({"damping": float("nan")}, "damping"),
    ],
)
def test_settings_that_cannot_work(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPTQQuantizer(**settings)


def test_levels_are_named_where_others_are_asked_for() -> None:
    weight, moment = _problem(4, 8)
    quantizer = GPTQQuantizer()
    with pytest.raises(ConfigError, match="gptq cannot do 5 bits: choose one of 2, 3, 4, 8"):
        quantizer.quantize(weight, moment, bits=5)
    with pytest.raises(ConfigError, match="cannot do 1 bits"):
        quantizer.storage_bits(4, 8, bits=1)
