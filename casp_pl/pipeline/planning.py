"""What a run will cost, told before it starts: memory and time from shapes, counts and one measured GEMM rate."""

import time
from dataclasses import dataclass

import torch

from casp_pl.models.adapter import ModelAdapter

__all__ = ["RunEstimate", "estimate_run", "gemm_rate"]

_BYTES = 4
# floating-point operations per weight that the search of the codes takes, measured against whole runs
_SEARCH_OPERATIONS_PER_WEIGHT = 60_000.0
_PROCESS_BYTES = 900 << 20  # Python with torch, lightning and transformers, before any weight


@dataclass(frozen=True)
class RunEstimate:
    """Rough, from shapes: peak memory in bytes and seconds by stage."""

    memory_bytes: int
    seconds: dict[str, float]

    @property
    def total_seconds(self) -> float:
        """All stages together."""
        return sum(self.seconds.values())


def gemm_rate(seconds: float = 0.2) -> float:
    """Floating-point operations a second of this machine's fp32 matrix product, on all of torch's threads."""
    a, b = torch.randn(1024, 576), torch.randn(576, 1536)
    a @ b
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ b
        count += 1
    return count * 2 * a.numel() * b.shape[1] / (time.perf_counter() - start)


def estimate_run(
    adapter: ModelAdapter,
    *,
    tokens: int,
    held_back_tokens: int,
    evaluation_tokens: int,
    tuning_epochs: int,
    steps: int,
    stages: int,
    rate: float,
) -> RunEstimate:
    """Memory and time of a fit.

    Args:
        adapter: the original model.
        tokens: calibration tokens.
        held_back_tokens: tokens that fine-tuning is stopped by.
        evaluation_tokens: tokens of one evaluation.
        tuning_epochs: passes of the block tuning.
        steps: optimizer steps of the end-to-end stage.
        stages: how many times the model is evaluated.
        rate: floating-point operations a second.
    """
    widths = adapter.shapes(0)
    block_weights = sum(o * i for o, i in widths.values())
    blocks = len(adapter.blocks)
    hidden = widths[adapter.linear_names[0]][1]
    inputs = sum(widths[group[0]][1] for group in adapter.linear_groups)
    all_tokens = tokens + held_back_tokens
    forward = 2.0 * block_weights * blocks
    useful = 0.5 * rate  # norms, attention and softmax run far below the rate of a matrix product
    moments = 2.0 * 2 * blocks * tokens * sum(widths[group[0]][1] ** 2 for group in adapter.linear_groups)
    search = _SEARCH_OPERATIONS_PER_WEIGHT * block_weights * blocks
    seconds = {
        "evaluation": stages * evaluation_tokens * forward / useful,
        "calibration": 1.5 * tokens * forward / useful,
        "quantization": (3.6 * tokens * forward + moments + search) / useful,
        "block tuning": (2 * all_tokens + 3.0 * tuning_epochs * all_tokens) * forward / useful,
        "end to end": (4.0 * steps * tokens / max(1, blocks) + 3 * held_back_tokens) * forward / useful,
    }
    model = sum(parameter.numel() for parameter in adapter.model.parameters()) * _BYTES
    streams = all_tokens * (3 * hidden + inputs) * _BYTES
    dense_copy = block_weights * blocks * _BYTES
    logits = 4 * 2048 * adapter.head.weight.shape[0] * _BYTES
    return RunEstimate(memory_bytes=_PROCESS_BYTES + model + dense_copy + max(streams, logits), seconds=seconds)
