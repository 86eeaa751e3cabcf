"""One block against the same work done by hand with dense layers."""

import copy
import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from casp_pl.allocation import ModulePlan, module_bits
from casp_pl.errors import NumericsError
from casp_pl.layers import LowRankLinear, QuantizedLinear, UniformLinear
from casp_pl.models import ModelAdapter
from casp_pl.models.compress import BlockQuantization, collect_moments, round_to_nearest
from casp_pl.models.streams import BlockBatch, first_block_batches, run_block, run_blocks, run_blocks_seeing
from casp_pl.quantizers import AQLMQuantizer, GPTQQuantizer, RTNQuantizer

BITS = {"q_proj": 3, "k_proj": 4, "v_proj": 2, "o_proj": 8, "gate_proj": 2, "up_proj": 3, "down_proj": 2}


class Recorder(RTNQuantizer):
    """Rounds to nearest and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__(group_size=12)
        self.rank_grain = 1
        self.calls: list[tuple[Tensor, Tensor, int]] = []

    def quantize(
        self,
        weight: Tensor,
        second_moment: Tensor,
        *,
        bits: int,
        bias: Tensor | None = None,
        generator: torch.Generator | None = None,
        together: bool = False,
    ) -> UniformLinear:
        assert generator is not None
        assert not together
        self.calls.append((weight.clone(), second_moment.clone(), generator.initial_seed()))
        return super().quantize(weight, second_moment, bits=bits, bias=bias)


def _plans(adapter: ModelAdapter, number: int, ranks: dict[str, int] | None = None, **bits: int) -> list[ModulePlan]:
    plans = []
    for name, shape in adapter.shapes(number).items():
        short = name.split(".")[-1]
        rank, width = (ranks or {}).get(short), (BITS | bits)[short]
        full = adapter.full_name(number, name)
        plans.append(ModulePlan(full, number, shape, "any", width, rank, None if rank is None else width, 1.0, ""))
    return plans


def _damaged(streams: Sequence[BlockBatch]) -> list[BlockBatch]:
    generator = torch.Generator().manual_seed(7)
    return [s.with_hidden(s.hidden + 0.3 * torch.randn(s.hidden.shape, generator=generator)) for s in streams]


def _seen(adapter: ModelAdapter, block: nn.Module, teacher: Sequence[BlockBatch]) -> list[dict[str, Tensor]]:
    return run_blocks_seeing(block, teacher, adapter.group_heads)[1]


@torch.no_grad()
def _dense_reference(
    adapter: ModelAdapter, block: nn.Module, streams: Sequence[BlockBatch]
) -> tuple[nn.Module, list[Tensor]]:
    """Every linear rounded in the true sequence, as plain dense layers, with the inputs that each one saw (N, I)."""
    block, rtn, inputs = copy.deepcopy(block), RTNQuantizer(group_size=12), []
    for name in adapter.linear_names:
        linear, rows = block.get_submodule(name), []
        handle = linear.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(inputs[0]))
        for stream in streams:
            run_block(block, stream)
        handle.remove()
        inputs.append(torch.cat([row[stream.real] for row, stream in zip(rows, streams, strict=True)]).double())
        rounded = rtn.quantize(linear.weight, torch.eye(linear.in_features), bits=BITS[name.split(".")[-1]])
        linear.weight.copy_(rounded.dequantize())
    return block, inputs


def test_without_propagation_every_linear_is_quantized_on_its_own_inputs_in_sequence(
    adapter: ModelAdapter, batches: list[dict[str, Any]]
) -> None:
    streams = first_block_batches(adapter, batches)
    original, recorder = adapter.blocks[0], Recorder()
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    block, reports, _ = BlockQuantization(propagation=0).compress_block(
        adapter, original, _plans(adapter, 0), recorder, [], streams
    )
    expected, inputs = _dense_reference(adapter, original, streams)
    for (weight, moment, _), name, x in zip(recorder.calls, adapter.linear_names, inputs, strict=True):
        wanted = (x.T @ x / len(x)).float()
        torch.testing.assert_close(weight, before[f"{name}.weight"])
        torch.testing.assert_close(moment, wanted, rtol=1e-4, atol=1e-5 * float(wanted.diagonal().mean()))
    for stream in streams:
        torch.testing.assert_close(run_block(block, stream), run_block(expected, stream))
    assert [report.name for report in reports] == [adapter.full_name(0, name) for name in adapter.linear_names]
    for name, report, x in zip(adapter.linear_names, reports, inputs, strict=True):
        weight, rounded = before[f"{name}.weight"], expected.get_submodule(name).weight
        loss = (x @ (weight - rounded).double().T).square().sum() / (x @ weight.double().T).square().sum()
        assert report.relative_proxy_loss == pytest.approx(float(loss), rel=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())


def test_moments_are_those_of_all_tokens_together(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    teacher = first_block_batches(adapter, batches)
    student, block = _damaged(teacher), adapter.blocks[0]
    x, seen = (
        torch.cat([block.input_layernorm(stream.hidden)[stream.real] for stream in streams])
        for streams in (teacher, student)
    )
    references = [block.input_layernorm(stream.hidden)[stream.real] for stream in teacher]
    moments = collect_moments(block, student, references, "self_attn.v_proj")
    torch.testing.assert_close(moments.second, seen.T @ seen / len(seen), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.cross, x.T @ seen / len(seen), rtol=1e-4, atol=1e-5)


def test_moments_of_bf16_inputs_are_summed_in_float32(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    streams, block = first_block_batches(adapter, batches, torch.bfloat16), adapter.blocks[0]
    name = "mlp.down_proj"
    inputs = [seen[name] for seen in run_blocks_seeing(block, streams, [name])[1]]
    assert {x.dtype for x in inputs} == {torch.bfloat16}
    moments, x = collect_moments(block, streams, inputs, name), torch.cat(inputs).double()
    expected = (x.T @ x / len(x)).float()
    for moment in (moments.second, moments.cross):
        torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-6 * float(expected.diagonal().mean()))


def test_propagation_aims_at_the_output_of_the_original(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    teacher = first_block_batches(adapter, batches)
    student, original = _damaged(teacher), adapter.blocks[0]
    x, seen = (
        torch.cat([original.input_layernorm(stream.hidden)[stream.real] for stream in streams])
        for streams in (teacher, student)
    )
    weight, errors = original.self_attn.q_proj.weight, []
    for alpha in (0.0, 0.5, 1.0):
        recorder = Recorder()
        BlockQuantization(propagation=alpha).compress_block(
            adapter, original, _plans(adapter, 0), recorder, _seen(adapter, original, teacher), student
        )
        errors.append(float((seen @ recorder.calls[0][0].T - x @ weight.T).norm()))
    solution = torch.linalg.lstsq(seen, x @ weight.T).solution
    best = float((seen @ solution - x @ weight.T).norm())
    assert errors[0] > errors[1] > errors[2] >= best * (1 - 1e-4)
    assert errors[2] < best + 0.1 * (errors[0] - best)


@pytest.mark.parametrize("wrong", ["one missing", "one twice", "one twice, one missing", "one too many"])
def test_wrong_set_of_plans_is_refused(adapter: ModelAdapter, batches: list[dict[str, Any]], wrong: str) -> None:
    plans = _plans(adapter, 0)
    changed = {
        "one missing": plans[1:],
        "one twice": [*plans, plans[0]],
        "one twice, one missing": [plans[0], *plans[:-1]],
        "one too many": [*plans, replace(plans[0], name="lm_head")],
    }[wrong]
    streams = first_block_batches(adapter, batches)
    with pytest.raises(ValueError, match="a block has 7 linears"):
        BlockQuantization().compress_block(adapter, adapter.blocks[0], changed, Recorder(), [], streams)


def test_bits_of_every_module_are_those_of_the_plan(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    streams = first_block_batches(adapter, batches)
    plans = _plans(adapter, 0, {"q_proj": 11, "k_proj": 9})
    block, reports, _ = BlockQuantization().compress_block(
        adapter,
        adapter.blocks[0],
        plans,
        RTNQuantizer(group_size=12),
        _seen(adapter, adapter.blocks[0], streams),
        streams,
    )
    for plan, report, name in zip(plans, reports, adapter.linear_names, strict=True):
        layer, (out_features, in_features) = block.get_submodule(name), plan.shape
        codes = plan.weights if plan.rank is None else plan.rank * (out_features + in_features)
        assert isinstance(layer, QuantizedLinear if plan.rank is None else LowRankLinear)
        assert layer.code_bits == plan.bits * codes
        assert report.bits_codes == pytest.approx(plan.bits * codes / plan.weights)
        assert report.bits_total == pytest.approx(layer.storage_bits / plan.weights)
        assert report.bits_total > report.bits_codes


def test_group_sizes_go_by_name(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    """A block, with a low-rank product in it, and the baseline; what costs were told is what they are."""
    streams, original = first_block_batches(adapter, batches), adapter.blocks[1]
    plans = _plans(adapter, 1, {"q_proj": 11}, o_proj=3)
    quantizer = GPTQQuantizer(group_size=16, group_sizes={"mlp": 9, "layers.1.self_attn.q_proj": 5, "down_proj": 24})
    sizes = {"gate_proj": 9, "up_proj": 9, "down_proj": 24, "q_proj": 5}
    seen = _seen(adapter, original, streams)
    block, reports, _ = BlockQuantization().compress_block(adapter, original, plans, quantizer, seen, streams)
    for plan, report, name in zip(plans, reports, adapter.linear_names, strict=True):
        layer, size = block.get_submodule(name), sizes.get(name.rsplit(".", 1)[-1], 16)
        parts = [layer] if plan.rank is None else [layer.input_factor, layer.output_factor]
        assert {part.group_size for part in parts} == {size}
        told = module_bits(quantizer.for_module(plan.name), plan.shape, bits=plan.bits, rank=plan.rank)
        assert (layer.code_bits, layer.storage_bits) == (told.codes, told.total)
        assert report.bits_total == told.total / plan.weights
    for number, baseline in enumerate(round_to_nearest(adapter, quantizer, 2)):
        query = baseline.get_submodule("self_attn.q_proj")
        assert query.group_size == (5 if number == 1 else 16)
        assert baseline.get_submodule("mlp.down_proj").group_size == 24


def test_a_linear_that_cannot_be_quantized_is_named(adapter: ModelAdapter) -> None:
    plan, linear = _plans(adapter, 0)[3], copy.deepcopy(adapter.blocks[0].self_attn.o_proj)
    moment = torch.eye(linear.in_features)
    with pytest.raises(NumericsError, match=rf"^{plan.name}: all \d+ groups of the weight .* outside float16"):
        BlockQuantization().compress_linear(linear, 1e-10 * linear.weight, plan, RTNQuantizer(), moment)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to give memory back")
@pytest.mark.parametrize(("width", "is_trimmed"), [(2900, True), (64, False)])
def test_a_large_linear_begins_with_a_trimmed_heap(adapter: ModelAdapter, width: int, is_trimmed: bool) -> None:
    plan = replace(_plans(adapter, 0)[3], shape=(4, width))
    linear, moment = nn.Linear(width, 4), torch.eye(width)
    tensors = [torch.ones(6000) for _ in range(10_000)]  # 240 MB, each too small to have pages of its own mapping
    kept = tensors[::50]
    del tensors
    before = psutil.Process().memory_info().rss
    BlockQuantization().compress_linear(linear, linear.weight, plan, RTNQuantizer(), moment)
    freed = before - psutil.Process().memory_info().rss
    assert (freed > 120e6) == is_trimmed
    assert len(kept) == 200


def test_inputs_that_are_always_0_are_counted(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    block = adapter.blocks[0]
    with torch.no_grad():
        block.post_attention_layernorm.weight[3:6] = 0
    streams = first_block_batches(adapter, batches)
    seen = _seen(adapter, block, streams)
    _, reports, _ = BlockQuantization().compress_block(adapter, block, _plans(adapter, 0), Recorder(), seen, streams)
    dead = {report.name.rsplit(".", 1)[-1]: report.dead_columns for report in reports}
    assert dead == dict.fromkeys(BITS, 0) | {"gate_proj": 3, "up_proj": 3}


def test_query_and_key_get_factors_of_their_own_weights(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    streams, original = first_block_batches(adapter, batches), adapter.blocks[0]
    plans = _plans(adapter, 0, {"q_proj": 48, "k_proj": 32}, q_proj=8, k_proj=8)
    block, _, _ = BlockQuantization(propagation=0).compress_block(
        adapter, original, plans, RTNQuantizer(group_size=8), [], streams
    )
    for name in ("q_proj", "k_proj"):
        layer, weight = getattr(block.self_attn, name), getattr(original.self_attn, name).weight
        assert (layer.dequantize() - weight).norm() < 0.1 * weight.norm()
    inner = [getattr(block.self_attn, name).input_factor.dequantize() for name in ("q_proj", "k_proj")]
    assert not torch.allclose(inner[0][:32], inner[1], atol=1e-2)


def test_a_block_alone_is_the_block_in_its_turn(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    quantizer = AQLMQuantizer(max_rounds=1, kmeans_iterations=2, feedback_beam=2, sweep_beam=1)
    quantization, ranks = BlockQuantization(seed=5), {"q_proj": 16, "k_proj": 8}
    plans = [_plans(adapter, number, ranks, o_proj=4) for number in range(2)]
    streams = first_block_batches(adapter, batches)
    teacher, seen = run_blocks_seeing(adapter.blocks[0], streams, adapter.group_heads)
    first, _, _ = quantization.compress_block(adapter, adapter.blocks[0], plans[0], quantizer, seen, streams)
    student, seen = run_blocks(first, streams), _seen(adapter, adapter.blocks[1], teacher)
    second, _, _ = quantization.compress_block(
        adapter, adapter.blocks[1], plans[1], quantizer, [dict(one) for one in seen], student
    )
    torch.manual_seed(99)  # the global generator has no say
    alone, _, _ = BlockQuantization(seed=5).compress_block(
        adapter, adapter.blocks[1], plans[1][::-1], copy.deepcopy(quantizer), seen, student
    )
    for name, tensor in second.state_dict().items():
        assert torch.equal(alone.state_dict()[name], tensor), name


def test_every_linear_has_a_seed_of_its_own(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    streams, recorder = first_block_batches(adapter, batches), Recorder()
    for seed in (0, 1):
        for number, block in enumerate(adapter.blocks):
            BlockQuantization(seed=seed).compress_block(
                adapter, block, _plans(adapter, number), recorder, _seen(adapter, block, streams), streams
            )
    assert len({seed for _, _, seed in recorder.calls}) == len(recorder.calls) == 2 * 2 * 7


def test_round_to_nearest_needs_no_inputs(adapter: ModelAdapter) -> None:
    quantizer = RTNQuantizer(group_size=12)
    blocks = round_to_nearest(adapter, quantizer, 3)
    for block, original in zip(blocks, adapter.blocks, strict=True):
        assert block is not original
        for name in adapter.linear_names:
            weight = original.get_submodule(name).weight
            layer = quantizer.quantize(weight, torch.eye(weight.shape[1]), bits=3)
            assert torch.equal(block.get_submodule(name).dequantize(), layer.dequantize())
