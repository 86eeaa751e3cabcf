"""The estimate against operations and parameters that torch counts itself."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from casp_pl.allocation import CompressionPlan, ModulePlan
from casp_pl.callbacks import BitAllocation, LowRankAllocation
from casp_pl.data.evaluation_work import EvaluationWork
from casp_pl.errors import ConfigError
from casp_pl.models.adapter import ModelAdapter, adapt
from casp_pl.models.load import load_model
from casp_pl.pipeline.footprint import BlockShape, kept_activations, stage_memory
from casp_pl.pipeline.outline import compressed_bytes
from casp_pl.pipeline.planning import (
    BlockCosts,
    Workload,
    block_costs_from_rates,
    effective_rate,
    stage_reads,
    stage_seconds,
)
from casp_pl.pipeline.probe import _typical_block
from casp_pl.pipeline.probe_quantizing import extrapolated
from casp_pl.pipeline.reading import ReadCosts, reading_seconds
from casp_pl.quantizers import GPTQQuantizer

WORK = Workload(
    blocks=2,
    tokens=1000,
    images=20,
    held_back_tokens=100,
    batch_tokens=250,
    follows_original=True,
    scored_tokens=0,
    evaluation=EvaluationWork(tokens=500, images=5, passes=30, answered=6, rows=60, scored=400),
    tuning_epochs=2,
    tuning_window=2,
    steps=10,
    codes_change=False,
    taught_tokens=800,
    counted_tokens=90,
    batches_bytes=5000,
    taught_bytes=4000,
)
RATES = {torch.float32: 1e9, torch.bfloat16: 4e9}


@pytest.fixture(scope="module")
def adapter() -> ModelAdapter:
    return adapt(load_model("tiny")[0])


def costs(
    adapter: ModelAdapter, work: Workload = WORK, dtype: torch.dtype = torch.float32, quantizer: str = "aqlm"
) -> BlockCosts:
    return block_costs_from_rates(adapter, work, quantizer=quantizer, dtype=dtype, rates=RATES)


def seconds(adapter: ModelAdapter, work: Workload = WORK, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    return stage_seconds(work, costs(adapter, work, dtype))


def test_a_forward_pass_is_counted_as_torch_counts_its_linears(adapter: ModelAdapter) -> None:
    tokens = 7
    with FlopCounterMode(display=False) as counter:
        for block in adapter.blocks:
            for name in adapter.linear_names:
                linear = block.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                linear(torch.zeros(tokens, linear.in_features))
    per_token = counter.get_total_flops() / tokens
    assert len(adapter.blocks) * costs(adapter).exact == pytest.approx(per_token / 1e9)


def test_stages_are_sums_of_what_is_measured() -> None:
    """One part at a time: how often does a stage run it?"""
    nothing: dict[str, Any] = {field.name: 0 for field in fields(BlockCosts)}
    tuning_passes = 2 * 1100 + 2 * 100  # teacher and student, then a validation an epoch
    step_passes = 10 * 250 + 6 * 100
    expected: dict[str, dict[str, float]] = {
        "exact": {"evaluate original": 2 * 500, "evaluate rtn": 2 * 500, "evaluation": 2 * 500},
        "answer": {"evaluate original": 2 * 6, "evaluate rtn": 2 * 6, "evaluation": 2 * 6},
        "dense": {"evaluate rtn": 2, "evaluation": 2},
        "baseline": {"evaluate rtn": 2},
        "logits": {"evaluate original": 400, "evaluate rtn": 800, "evaluation": 800},
        "spectra": {"calibration": 2 * 1000},
        "values": {"calibration": 2},
        "quantize": {"quantization": 2},
        "moments": {"quantization": 2 * 1000},
        "train": {"block tuning": 2 * 2 * 4, "end to end": 2 * 10},
        "head": {"end to end": 10},
        "forward": {"calibration": 2 * 1100, "quantization": 2 * 1000, "block tuning": 2 * tuning_passes,
                    "end to end": 2 * step_passes},
    }  # fmt: skip
    for part, stages in expected.items():
        block = BlockCosts(**{**nothing, part: 1.0})
        found = {stage: time for stage, time in stage_seconds(WORK, block).items() if time}
        assert found == pytest.approx(stages), part


def test_without_propagation_the_original_is_passed_through_once_less(adapter: ModelAdapter) -> None:
    alone = replace(WORK, follows_original=False)
    both, one = costs(adapter), costs(adapter, alone)
    widths = [adapter.shapes(0)[head][1] for head in adapter.group_heads]
    assert both.moments - one.moments == pytest.approx(2 * sum(width**2 for width in widths) / 1e9)
    spared = stage_seconds(WORK, one)["quantization"] - stage_seconds(alone, one)["quantization"]
    assert spared == pytest.approx(2 * 1000 * one.forward)


def test_half_precision_shortens_all_but_evaluation(adapter: ModelAdapter) -> None:
    exact, half = seconds(adapter), seconds(adapter, dtype=torch.bfloat16)
    assert half["evaluation"] == exact["evaluation"]
    assert all(half[stage] < exact[stage] for stage in exact if not stage.startswith("evaluat"))


def test_each_quantizer_has_a_search_of_its_own(adapter: ModelAdapter) -> None:
    """In the order in which a block of the 7B shape was measured: 1475, 935 and 2260 s were quip, gptq and aqlm."""
    found = {name: costs(adapter, quantizer=name).quantize for name in ("rtn", "gptq", "quip", "aqlm")}
    assert list(found) == sorted(found, key=lambda name: found[name])


def test_a_streamed_evaluation_reads_the_model_once_for_every_pass() -> None:
    reads = stage_reads(WORK, scores=True)
    assert reads["evaluate original"].original == 30 + 1
    assert reads["calibration"].original == 1 + 2 + 1
    told = ReadCosts(first=3.0, again=1.0, measured=1)
    spent: dict[str, Any] = {"original_bytes": 10, "compressed_bytes": 2, "dense": 5.0}
    computing = dict.fromkeys(reads, 400.0)
    cached = reading_seconds(reads, computing, told, cached=True, **spent)
    assert cached["evaluate original"] == 31 * 10
    assert cached["evaluation"] == 32 * 2 + 29 * 5
    cold = reading_seconds(reads, computing, told, cached=False, **spent)
    assert cold["evaluate original"] == 31 * 10 + (31 * 10 * 2 - 400), "the next block is read while one computes"
    assert cold["block tuning"] == cached["block tuning"], "which takes longer than the disk"


def test_what_grows_with_the_cube_is_told_from_what_grows_with_weights() -> None:
    assert extrapolated(lambda share: 7 * share**3 + 5 * share**2) == pytest.approx(12)
    assert extrapolated(lambda share: share) == pytest.approx(4), "less than in proportion: no negative cube"
    assert extrapolated(lambda share: share**4) == pytest.approx(0.25)


def test_stages_that_are_left_out_cost_nothing(adapter: ModelAdapter) -> None:
    bare = replace(WORK, steps=0, tuning_epochs=0)
    assert seconds(adapter, bare)["end to end"] == seconds(adapter, bare)["block tuning"] == 0
    shape = BlockShape.of(adapter)
    least, most = (max(stage_memory(shape, work, torch.float32, 1e4, 1000).values()) for work in (bare, WORK))
    assert least <= most
    assert kept_activations(shape, bare, torch.float32).keys() == {"calibration", "quantize"}


def test_memory_holds_the_model_and_grows_with_batch_and_data(adapter: ModelAdapter) -> None:
    shape = BlockShape.of(adapter)
    assert shape.model_bytes == sum(p.numel() * p.element_size() for p in adapter.model.parameters())

    def memory(work: Workload) -> dict[str, int]:
        stages = stage_memory(shape, work, torch.float32, 1e4, 1000)
        return {name: size + kept_activations(shape, work, torch.float32).get(name, 0) for name, size in stages.items()}

    assert min(memory(WORK).values()) > shape.model_bytes
    wide, long = replace(WORK, batch_tokens=25_000), replace(WORK, tokens=10_000_000)
    assert memory(wide)["end to end"] - memory(WORK)["end to end"] > 2 * (25_000 - 250) * 1e4, "of two blocks"
    assert memory(long)["quantize"] - memory(WORK)["quantize"] > 9_990_000 * 3 * 48 * 4
    assert memory(long)["end to end"] == memory(WORK)["end to end"]
    taught = replace(WORK, taught_tokens=10_000_800, counted_tokens=1_000_090)
    states = 2 * 10_000_000 + 1_000_000  # two of every token while they are made, then those of the counted ones
    assert memory(taught)["end to end"] - memory(WORK)["end to end"] == states * 48 * 4
    assert memory(taught)["block tuning"] == memory(WORK)["block tuning"]


@pytest.mark.parametrize("bits", [2, 8])
def test_compressed_linears_take_what_their_layers_take(bits: int, adapter: ModelAdapter) -> None:
    quantizer = GPTQQuantizer(group_sizes={"down_proj": 10, "layers.0.self_attn": 7, "layers.1.self_attn.v_proj": 24})
    low_rank = LowRankAllocation(keep_ratio=0.5)
    allocation = BitAllocation(budget=float(bits), factor_bits=bits)
    allocation.attach(quantizer, low_rank)
    plan = allocation.make_plan(adapter, low_rank.choose(adapter, None), None)
    taken = stored = 0
    for module in plan.modules:
        own = quantizer.for_module(module.name)
        weight = adapter.model.get_submodule(module.name).weight.detach()
        made = [(weight, weight.shape[1])]
        if module.rank is not None:
            made = [(weight[: module.rank], weight.shape[1]), (weight[:, : module.rank], module.rank)]
        layers = [own.quantize(part, torch.eye(width), bits=module.bits) for part, width in made]
        stored += sum(layer.storage_bits for layer in layers)
        expected = {"q_proj": (7, 64), "k_proj": (7, 64), "v_proj": (7, 24), "o_proj": (7, 64), "down_proj": (10, 10)}
        size = expected.get(module.name.rsplit(".", 1)[-1], (64, 64))[".layers.1." in module.name]
        assert {layer.group_size for layer in layers} == {size}
        taken += sum(tensor.nbytes for layer in layers for tensor in layer.state_dict().values())
    assert compressed_bytes(adapter, plan, quantizer) == taken
    assert plan.bits_per_weight_total == stored / plan.weights


def test_group_sizes_of_no_linear_are_refused(adapter: ModelAdapter) -> None:
    allocation, low_rank = BitAllocation(budget=2.0), LowRankAllocation(keep_ratio=0.5)
    allocation.attach(GPTQQuantizer(group_sizes={"down_prj": 32}), low_rank)
    with pytest.raises(ConfigError, match="quantizer.group_sizes: no linear has 'down_prj' in its name; one is called"):
        allocation.make_plan(adapter, low_rank.choose(adapter, None), None)


def test_the_block_that_is_measured_has_the_group_sizes_of_most(adapter: ModelAdapter) -> None:
    def module(block: int) -> ModulePlan:
        name = f"model.layers.{block}.mlp.up_proj"
        return ModulePlan(
            name=name,
            block=block,
            shape=(8, 8),
            quantizer="gptq",
            bits=2,
            rank=None,
            factor_bits=None,
            score=1.0,
            why=".",
        )

    plan = CompressionPlan(
        model="m", modules=tuple(map(module, range(4))), budget=2.0, counts="codes",
        bits_per_weight_codes=2.0, bits_per_weight_total=2.0,
    )  # fmt: skip
    for sizes, number in (({}, 0), ({"layers.0": 8}, 1), ({"layers.0": 8, "layers.1": 8, "layers.3": 8}, 0)):
        assert _typical_block(plan, GPTQQuantizer(group_sizes=sizes)) == plan.of_block(number)


def test_rates_are_measured() -> None:
    assert 1e8 < effective_rate(torch.float32, torch.device("cpu"), seconds=0.02) < 1e14
