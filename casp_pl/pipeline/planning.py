"""What a run will cost, told before it starts: memory and time from shapes, counts and measured GEMM rates.

The constants were fitted to whole runs on the embedded model (2 cores, AQLM): stages and peak memory are met within a
fifth.
"""

import time
from dataclasses import dataclass

import torch

from casp_pl.models.adapter import ModelAdapter

__all__ = ["RunEstimate", "Workload", "effective_rate", "estimate_run"]

_BYTES = 4
_PROCESS_BYTES = 900 << 20  # Python with torch, lightning and transformers, before any weight
_HEAP_SLACK = 1.5  # what the heap takes for what is in it
# what a model gets of the rate of one large product; norms, attention and softmax gain nothing from half precision
_SHARE = {torch.float32: 0.75, torch.bfloat16: 0.5, torch.float16: 0.5}
_SEARCH_OPERATIONS = 185_000.0  # a weight, for the search of its codes
_DEQUANTIZING_OPERATIONS = 1_300.0  # a weight and training step, forward and backward
_LOGITS_AT_ONCE = 128  # tokens, see `head_divergence`


@dataclass(frozen=True)
class RunEstimate:
    """Rough, from shapes: peak memory in bytes and seconds by stage."""

    memory_bytes: int
    seconds: dict[str, float]

    @property
    def total_seconds(self) -> float:
        """All stages together."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Workload:
    """How much a recipe computes.

    Attributes:
        tokens: calibration tokens.
        held_back_tokens: tokens that fine-tuning is stopped by.
        batch_tokens: tokens of one batch of training.
        evaluation_tokens: tokens of one evaluation.
        evaluations: how many times the model is evaluated.
        tuning_epochs: passes of the block tuning.
        tuning_window: blocks that are tuned together.
        steps: optimizer steps of the end-to-end stage.
    """

    tokens: int
    held_back_tokens: int
    batch_tokens: int
    evaluation_tokens: int
    evaluations: int
    tuning_epochs: int
    tuning_window: int
    steps: int


def effective_rate(dtype: torch.dtype, device: torch.device, *, seconds: float = 0.2) -> float:
    """Floating-point operations a second that a model makes here in this dtype, from a matrix product that is timed."""
    a, b = torch.randn(1024, 576, device=device).to(dtype), torch.randn(576, 1536, device=device).to(dtype)
    float((a @ b)[0, 0])  # warm; reading one element waits for the device
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        float((a @ b)[0, 0])
        count += 1
    return _SHARE[dtype] * count * 2 * a.numel() * b.shape[1] / (time.perf_counter() - start)


def estimate_run(
    adapter: ModelAdapter, work: Workload, *, dtype: torch.dtype, rates: dict[torch.dtype, float]
) -> RunEstimate:
    """Memory and time of a fit.

    Args:
        adapter: the original model.
        work: what the recipe asks for.
        dtype: what all but evaluation, moments and the search of the codes is computed in.
        rates: operations a second, see `effective_rate`, of that dtype and of float32.
    """
    return RunEstimate(
        _peak_memory(adapter, work, dtype), _stage_seconds(adapter, work, rates[dtype], rates[torch.float32])
    )


def _stage_seconds(adapter: ModelAdapter, work: Workload, rate: float, exact_rate: float) -> dict[str, float]:
    """Seconds by stage at `rate` operations a second, at `exact_rate` where float32 is kept."""
    widths, blocks = adapter.shapes(0), len(adapter.blocks)
    weights = blocks * sum(o * i for o, i in widths.values())
    forward = 2.0 * weights  # operations a token; a training step makes three times as many
    head = 2.0 * adapter.head.weight.numel()
    squares = blocks * sum(widths[group[0]][1] ** 2 for group in adapter.linear_groups)
    all_tokens = work.tokens + work.held_back_tokens
    dequantizing = _DEQUANTIZING_OPERATIONS * weights / exact_rate
    tuning = 2 * all_tokens + work.tuning_epochs * (3 * work.tokens + work.held_back_tokens)
    passes = work.tuning_epochs * -(-work.tokens // work.batch_tokens)
    moments = 4.0 * squares * work.tokens  # second and cross
    return {
        "evaluation": work.evaluations * work.evaluation_tokens * forward / exact_rate,
        "calibration": 1.5 * work.tokens * forward / rate,
        "quantization": 3.6 * work.tokens * forward / rate + (moments + _SEARCH_OPERATIONS * weights) / exact_rate,
        "block tuning": tuning * forward / rate + passes * dequantizing,
        "end to end": work.steps * (work.batch_tokens * (4 * forward + 3 * head) / rate + dequantizing)
        + 6 * work.held_back_tokens * forward / rate,
    }


def _peak_memory(adapter: ModelAdapter, work: Workload, dtype: torch.dtype) -> int:
    """Bytes of the process at the largest of quantization, block tuning and end-to-end fine-tuning."""
    widths, blocks = adapter.shapes(0), len(adapter.blocks)
    weights = sum(o * i for o, i in widths.values())
    hidden = widths[adapter.linear_names[0]][1]
    widest = max(i for _, i in widths.values())
    inputs = sum(widths[group[0]][1] for group in adapter.linear_groups)
    all_tokens = work.tokens + work.held_back_tokens
    model = sum(parameter.numel() for parameter in adapter.model.parameters()) * _BYTES + 2 * weights * blocks
    streams = all_tokens * (3 * hidden * _BYTES + inputs * dtype.itemsize)
    kept = work.batch_tokens * (16 * hidden + 4 * widest) * dtype.itemsize  # for the backward pass of one block
    dense = weights * (_BYTES + (dtype.itemsize if dtype != torch.float32 else 0))
    logits = 4 * min(work.batch_tokens, _LOGITS_AT_ONCE) * adapter.head.weight.shape[0] * _BYTES
    window = streams + work.tuning_window * (kept + dense) if work.tuning_epochs else 0
    end_to_end = blocks * (kept + dense) + logits if work.steps else 0
    baseline = weights * blocks * _BYTES
    return _PROCESS_BYTES + int(_HEAP_SLACK * (model + max(streams, baseline + logits, window, end_to_end)))
