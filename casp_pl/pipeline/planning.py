"""What a run will take: seconds by stage, from what one block takes and how often a recipe runs it.

Letters: a block's forward pass costs 2 operations a weight and token, backward twice as many.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from casp_pl.models.adapter import ModelAdapter

__all__ = ["BlockCosts", "Workload", "block_costs_from_rates", "effective_rate", "stage_seconds"]

# what a model gets of the rate of one large product; norms, attention and softmax gain nothing from half precision
_SHARE = {torch.float32: 0.75, torch.bfloat16: 0.5, torch.float16: 0.5}
_SEARCH_OPERATIONS = 185_000.0  # a weight, for the search of its codes by AQLM; fitted to whole runs on two cores
_DEQUANTIZING_OPERATIONS = 1_300.0  # a weight and training step, forward and backward; fitted likewise
_SPREAD_OF_RATES = 0.4  # whole runs with AQLM were met within a fifth; other quantizers search in other ways
_PARTIAL_PASSES = 1.6  # what collecting the moments of four groups runs of a block, in forward passes


@dataclass(frozen=True)
class Workload:
    """How much a recipe computes.

    Attributes:
        blocks: decoder blocks of the model.
        tokens: calibration tokens.
        held_back_tokens: tokens that fine-tuning is stopped by.
        batch_tokens: tokens of one batch of training.
        evaluation_tokens: tokens of one evaluation.
        tuning_epochs: passes of the block tuning; 0 leaves it out.
        tuning_window: blocks that are tuned together.
        steps: optimizer steps of the end-to-end stage; 0 leaves it out.
        taught_tokens: tokens of the samples that these steps see, each once.
        counted_tokens: of these and those held back, the tokens that are trained on.
        batches_bytes: of all batches of calibration, tuning and held back as tensors, pixels above all.
        taught_bytes: likewise of those that the steps see.
    """

    blocks: int
    tokens: int
    held_back_tokens: int
    batch_tokens: int
    evaluation_tokens: int
    tuning_epochs: int
    tuning_window: int
    steps: int
    taught_tokens: int
    counted_tokens: int
    batches_bytes: int
    taught_bytes: int


@dataclass(frozen=True)
class BlockCosts:
    """What one block of the model takes on this machine, in seconds where nothing else is said.

    Attributes:
        exact: forward pass in float32, a token.
        forward: forward pass in the working precision, a token.
        moments: second and cross moments of all groups, partial forward passes included, a token.
        quantize: search of the codes of all linears.
        train: forward and backward pass with compressed weights, and Adam, a batch of training.
        head: logits, their divergence and its gradient, a batch of training; of the whole model, not of a block.
        prefix: embeddings, vision tower and projector, a token; of the whole model, not of a block.
        kept_bytes: that autograd keeps for the backward pass, a token of a batch; bytes, not seconds.
        source: where the figures come from, for the reader.
        spread: by which share of itself a stage may take more or less.
    """

    exact: float
    forward: float
    moments: float
    quantize: float
    train: float
    head: float
    prefix: float
    kept_bytes: float
    source: str
    spread: float


def effective_rate(dtype: torch.dtype, device: torch.device, *, seconds: float = 0.2) -> float:
    """Floating-point operations a second that a model makes here in this dtype, from a matrix product that is timed."""
    a, b = torch.randn(1024, 576, device=device).to(dtype), torch.randn(576, 1536, device=device).to(dtype)
    float((a @ b)[0, 0])  # warm; reading one element waits for the device
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        float((a @ b)[0, 0])
        count += 1
    return _SHARE[dtype] * count * 2 * a.numel() * b.shape[1] / (time.perf_counter() - start)


def block_costs_from_rates(
    adapter: ModelAdapter, work: Workload, *, dtype: torch.dtype, rates: Mapping[torch.dtype, float]
) -> BlockCosts:
    """What a block takes, from shapes and rates; the search of codes as AQLM's.

    Args:
        adapter: the original model; its weights are not read.
        work: what the recipe asks for.
        dtype: what all but evaluation, moments and the search of the codes is computed in.
        rates: operations a second, see `effective_rate`, of that dtype and of float32.
    """
    widths = adapter.shapes(0)
    weights = sum(o * i for o, i in widths.values())
    squares = sum(widths[group[0]][1] ** 2 for group in adapter.linear_groups)
    rate, exact_rate = rates[dtype], rates[torch.float32]
    forward = 2.0 * weights / rate
    return BlockCosts(
        exact=2.0 * weights / exact_rate,
        forward=forward,
        moments=_PARTIAL_PASSES * forward + 4.0 * squares / exact_rate,
        quantize=_SEARCH_OPERATIONS * weights / exact_rate,
        train=work.batch_tokens * 3 * forward + _DEQUANTIZING_OPERATIONS * weights / exact_rate,
        head=work.batch_tokens * 6.0 * adapter.head.weight.numel() / rate,
        prefix=0.0,
        kept_bytes=_kept_bytes(adapter, work, dtype),
        source="rates of a matrix product, timed here",
        spread=_SPREAD_OF_RATES,
    )


def _kept_bytes(adapter: ModelAdapter, work: Workload, dtype: torch.dtype) -> float:
    """A token's activations, and its share of a dense weight, in float32 and in `dtype`; fitted to AQLM."""
    widths = adapter.shapes(0)
    hidden, widest = widths[adapter.linear_names[0]][1], max(i for _, i in widths.values())
    dense = sum(o * i for o, i in widths.values()) * (4 + (dtype.itemsize if dtype != torch.float32 else 0))
    return (20 * hidden + 5 * widest) * dtype.itemsize + dense / work.batch_tokens


def stage_seconds(work: Workload, block: BlockCosts) -> dict[str, float]:
    """Seconds by stage: one evaluation, calibration, quantization, block tuning, end to end."""
    count, all_tokens = work.blocks, work.tokens + work.held_back_tokens
    batches = -(-work.tokens // work.batch_tokens)
    tuning = end_to_end = 0.0
    if work.tuning_epochs:
        # the original and the compressed block make the inputs of the next; then epochs, each with a validation
        epoch = batches * block.train + work.held_back_tokens * block.forward
        tuning = all_tokens * block.prefix + count * (2 * all_tokens * block.forward + work.tuning_epochs * epoch)
    if work.steps:
        one_pass = count * block.forward + block.prefix
        step = count * block.train + work.batch_tokens * (one_pass + block.prefix) + block.head  # with the teacher's
        end_to_end = work.steps * step + 6 * work.held_back_tokens * one_pass
    return {
        "evaluation": work.evaluation_tokens * (count * block.exact + block.prefix),
        "calibration": work.tokens * (1.5 * count * block.forward + block.prefix),
        "quantization": work.tokens * (count * (2 * block.forward + block.moments) + block.prefix)
        + count * block.quantize,
        "block tuning": tuning,
        "end to end": end_to_end,
    }
