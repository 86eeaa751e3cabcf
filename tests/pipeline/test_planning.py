"""The estimate against operations and parameters that torch counts itself."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from casp_pl.models.adapter import ModelAdapter, adapt
from casp_pl.models.load import load_model
from casp_pl.pipeline.planning import Workload, effective_rate, estimate_run

WORK = Workload(
    tokens=1000,
    held_back_tokens=100,
    batch_tokens=250,
    evaluation_tokens=500,
    evaluations=3,
    tuning_epochs=2,
    tuning_window=2,
    steps=10,
)
RATES = {torch.float32: 1e9, torch.bfloat16: 4e9}


@pytest.fixture(scope="module")
def adapter() -> ModelAdapter:
    return adapt(load_model("tiny")[0])


def test_a_forward_pass_is_counted_as_torch_counts_its_linears(adapter: ModelAdapter) -> None:
    tokens = 7
    with FlopCounterMode(display=False) as counter:
        for block in adapter.blocks:
            for name in adapter.linear_names:
                linear = block.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                linear(torch.zeros(tokens, linear.in_features))
    per_token = counter.get_total_flops() / tokens
    seconds = estimate_run(adapter, WORK, dtype=torch.float32, rates=RATES).seconds
    assert seconds["evaluation"] == pytest.approx(3 * 500 * per_token / 1e9)
    assert seconds["calibration"] == pytest.approx(1.5 * 1000 * per_token / 1e9)


def test_half_precision_shortens_all_but_evaluation(adapter: ModelAdapter) -> None:
    exact = estimate_run(adapter, WORK, dtype=torch.float32, rates=RATES)
    half = estimate_run(adapter, WORK, dtype=torch.bfloat16, rates=RATES)
    assert half.seconds["evaluation"] == exact.seconds["evaluation"]
    assert all(half.seconds[stage] < exact.seconds[stage] for stage in exact.seconds if stage != "evaluation")
    assert half.total_seconds == pytest.approx(sum(half.seconds.values()))


def test_stages_that_are_left_out_cost_nothing_to_speak_of(adapter: ModelAdapter) -> None:
    full = estimate_run(adapter, WORK, dtype=torch.float32, rates=RATES)
    bare = estimate_run(adapter, replace(WORK, steps=0, tuning_epochs=0), dtype=torch.float32, rates=RATES)
    assert bare.seconds["end to end"] < 0.2 * full.seconds["end to end"]
    assert bare.memory_bytes <= full.memory_bytes


def test_memory_holds_the_model_and_grows_with_batch_and_data(adapter: ModelAdapter) -> None:
    def memory(work: Workload) -> int:
        return estimate_run(adapter, work, dtype=torch.float32, rates=RATES).memory_bytes

    assert memory(WORK) > sum(p.numel() * p.element_size() for p in adapter.model.parameters())
    assert memory(replace(WORK, batch_tokens=25_000)) > memory(WORK)
    assert memory(replace(WORK, tokens=10_000_000)) > memory(WORK)


def test_rates_are_measured() -> None:
    assert 1e8 < effective_rate(torch.float32, torch.device("cpu"), seconds=0.02) < 1e14
