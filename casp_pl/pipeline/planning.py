"""What a run will take: seconds by stage, from what one block takes and how often a recipe runs it.

Letters: a block's forward pass costs 2 operations a weight and token, backward twice as many.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from casp_pl.data.evaluation_work import EvaluationWork
from casp_pl.models.adapter import ModelAdapter

__all__ = [
    "BlockCosts",
    "Reads",
    "Workload",
    "block_costs_from_rates",
    "effective_rate",
    "stage_reads",
    "stage_seconds",
]

# what a model gets of the rate of one large product; norms, attention and softmax gain nothing from half precision
_SHARE = {torch.float32: 0.75, torch.bfloat16: 0.5, torch.float16: 0.5}
# by quantizer, operations in float32 a weight for the search of its codes. AQLM's is fitted to whole runs on the
# embedded model; the others are to it as their seconds for gate and up are in `benchmarks.large_model`
_SEARCH_OPERATIONS = {"aqlm": 135_000.0, "quip": 80_000.0, "gptq": 21_000.0, "rtn": 1_000.0}
_SPECTRUM_OPERATIONS = 24.0  # a weight and rank of a matrix whose singular values are computed, in float64
_DEQUANTIZING_OPERATIONS = 1_300.0  # a weight and training step, forward and backward; fitted likewise
_COMPRESSED_PASSES = 1.5  # all passes of the compressed batches through a block, each begun where the last one was
_SENSITIVITY_PASSES = 4.0  # forward, and forward and backward


@dataclass(frozen=True)
class Workload:
    """How much a recipe computes.

    Attributes:
        blocks: decoder blocks of the model.
        tokens: calibration tokens.
        images: images of the calibration.
        held_back_tokens: tokens that fine-tuning is stopped by.
        batch_tokens: tokens of one batch of training.
        follows_original: whether calibration passes through the original too while blocks are quantized.
        scored_tokens: of these and those of calibration, tokens whose gradient tells how much linears matter.
        evaluation: what one evaluation computes.
        tuning_epochs: passes of the block tuning; 0 leaves it out.
        tuning_window: blocks that are tuned together.
        steps: optimizer steps of the end-to-end stage; 0 leaves it out.
        codes_change: whether these steps change codes.
        taught_tokens: tokens of the samples that these steps see, each once.
        counted_tokens: of these and those held back, the tokens that are trained on.
        batches_bytes: of all batches of calibration, tuning and held back as tensors, pixels above all.
        taught_bytes: likewise of those that the steps see.
    """

    blocks: int
    tokens: int
    images: int
    held_back_tokens: int
    batch_tokens: int
    follows_original: bool
    scored_tokens: int
    evaluation: EvaluationWork
    tuning_epochs: int
    tuning_window: int
    steps: int
    codes_change: bool
    taught_tokens: int
    counted_tokens: int
    batches_bytes: int
    taught_bytes: int

    def images_of(self, tokens: float) -> float:
        """Images in so many tokens of the calibration or of training."""
        return self.images * tokens / max(1, self.tokens)


@dataclass(frozen=True)
class BlockCosts:
    """What one block of the model takes on this machine, in seconds where nothing else is said.

    Attributes:
        exact: forward pass in float32, a token.
        forward: forward pass in the working precision, a token.
        answer: forward pass in float32 of the answers of one batch of questions, a token each.
        spectra: second moments of what the first group reads, a token.
        values: singular values of the linears that become low-rank products.
        moments: second and, where the original is followed, cross moments of all groups, with the passes through the
            compressed block, a token.
        quantize: all that is done with the weights of a block: targets, factors, search of the codes.
        baseline: rounding a block to the nearest.
        dense: making its compressed weights dense.
        train: forward and backward pass with compressed weights, and Adam, a batch of training.
        head: logits, their divergence and its gradient, a batch of training; of the whole model, not of a block.
        logits: logits in float32, a token; of the whole model.
        vision: vision tower and projector, an image; of the whole model.
        kept_bytes: that autograd keeps for the backward pass, a token of a batch; bytes, not seconds.
        source: where the figures come from, for the reader.
        spread: by which share of itself what was measured was more or less when it was repeated; 0 if it was not.
        measured: whether a block was measured; else all are from rates.
        extrapolated: whether `quantize` was measured on smaller matrices.
    """

    exact: float
    forward: float
    answer: float
    spectra: float
    values: float
    moments: float
    quantize: float
    baseline: float
    dense: float
    train: float
    head: float
    logits: float
    vision: float
    kept_bytes: float
    source: str
    spread: float
    measured: bool
    extrapolated: bool


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
    adapter: ModelAdapter, work: Workload, *, quantizer: str, dtype: torch.dtype, rates: Mapping[torch.dtype, float]
) -> BlockCosts:
    """What a block takes, from shapes and rates.

    Args:
        adapter: the original model; its weights are not read.
        work: what the recipe asks for.
        quantizer: name of the quantizer.
        dtype: what all but evaluation, moments and the search of the codes is computed in.
        rates: operations a second, see `effective_rate`, of that dtype and of float32.
    """
    widths = adapter.shapes(0)
    weights = sum(o * i for o, i in widths.values())
    squares = [widths[head][1] ** 2 for head in adapter.group_heads]
    low_rank = sum(o * i * min(o, i) for o, i in (widths[name] for name in adapter.low_rank_names))
    rate, exact_rate = rates[dtype], rates[torch.float32]
    forward, head = 2.0 * weights / rate, adapter.head.weight.numel()
    outside = sum(parameter.numel() for parameter in adapter.outside_parameters()) - 2 * head
    search = _SEARCH_OPERATIONS.get(quantizer, _SEARCH_OPERATIONS["aqlm"])
    return BlockCosts(
        exact=2.0 * weights / exact_rate,
        forward=forward,
        answer=2.0 * weights * work.evaluation.rows / max(1, work.evaluation.answered) / exact_rate,
        spectra=2.0 * squares[0] / exact_rate,
        values=_SPECTRUM_OPERATIONS / 2 * low_rank / exact_rate,
        moments=_COMPRESSED_PASSES * forward + 2.0 * (1 + work.follows_original) * sum(squares) / exact_rate,
        quantize=(search * weights + _SPECTRUM_OPERATIONS * low_rank) / exact_rate,
        baseline=_SEARCH_OPERATIONS["rtn"] * weights / exact_rate,
        dense=_DEQUANTIZING_OPERATIONS / 3 * weights / exact_rate,
        train=work.batch_tokens * 3 * forward + _DEQUANTIZING_OPERATIONS * weights / exact_rate,
        head=work.batch_tokens * 6.0 * head / rate,
        logits=2.0 * head / exact_rate,
        vision=2.0 * max(0, outside) * work.images_of(work.tokens) / exact_rate,
        kept_bytes=_kept_bytes(adapter, work, dtype),
        source="rates of a matrix product, timed here",
        spread=0.0,
        measured=False,
        extrapolated=False,
    )


def _kept_bytes(adapter: ModelAdapter, work: Workload, dtype: torch.dtype) -> float:
    """A token's activations, and its share of a dense weight, in float32 and in `dtype`; fitted to AQLM."""
    widths = adapter.shapes(0)
    hidden, widest = widths[adapter.linear_names[0]][1], max(i for _, i in widths.values())
    dense = sum(o * i for o, i in widths.values()) * (4 + (dtype.itemsize if dtype != torch.float32 else 0))
    return (20 * hidden + 5 * widest) * dtype.itemsize + dense / work.batch_tokens


def stage_seconds(work: Workload, block: BlockCosts) -> dict[str, float]:
    """Seconds by stage, reading files left out: evaluations, calibration, quantization, block tuning, end to end."""
    count, all_tokens = work.blocks, work.tokens + work.held_back_tokens
    vision = block.vision * work.images_of(all_tokens)
    batches = -(-work.tokens // work.batch_tokens)
    tuning = end_to_end = 0.0
    if work.tuning_epochs:
        # the original and the compressed block make the inputs of the next; then epochs, each with a validation
        epoch = batches * block.train + work.held_back_tokens * block.forward
        tuning = vision + count * (2 * all_tokens * block.forward + work.tuning_epochs * epoch)
    if work.steps:
        seen = work.batch_tokens + 6 * work.held_back_tokens / work.steps  # a step, with its share of validations
        passes = seen * count * block.forward + block.vision * (
            work.images_of(seen) + work.images_of(work.batch_tokens)
        )
        end_to_end = work.steps * (count * block.train + passes + block.head)  # the teacher's pass among these
    scored = _SENSITIVITY_PASSES * work.scored_tokens * count * block.forward
    original, compressed = (_evaluation(work, block, compressed=compressed) for compressed in (False, True))
    return {
        "evaluate original": original,
        "evaluate rtn": compressed + count * block.baseline,
        "evaluation": compressed,
        "calibration": vision
        + scored
        + count * (all_tokens * block.forward + work.tokens * block.spectra + block.values),
        "quantization": block.vision * work.images
        + count * (work.tokens * (work.follows_original * block.forward + block.moments) + block.quantize),
        "block tuning": tuning,
        "end to end": end_to_end,
    }


def _evaluation(work: Workload, block: BlockCosts, *, compressed: bool) -> float:
    """Seconds of one evaluation; a compressed model is made dense before, and compared with the original's logits."""
    asked = work.evaluation
    blocks = work.blocks * (asked.tokens * block.exact + asked.answered * block.answer + compressed * block.dense)
    return blocks + asked.images * block.vision + asked.scored * block.logits * (1 + compressed)


@dataclass(frozen=True)
class Reads:
    """How often a stage of a streamed run reads all blocks, and how often it makes compressed ones dense for a pass.

    Attributes:
        original: the original's blocks out of the model's files.
        compressed: compressed blocks out of the run directory.
        dense: passes for which they are made dense, beyond the one that `stage_seconds` counts.
    """

    original: int = 0
    compressed: int = 0
    dense: int = 0


def stage_reads(work: Workload, *, scores: bool) -> dict[str, Reads]:
    """Reads by stage, named as in `stage_seconds`; `scores`: whether bits are given out by sensitivity."""
    passes = work.evaluation.passes
    each = Reads(compressed=passes + 2, dense=max(0, passes - 1))  # its bits and bytes are counted, each in one read
    return {
        "evaluate original": Reads(original=passes + 1),
        "evaluate rtn": Reads(original=1, compressed=each.compressed, dense=each.dense),
        "evaluation": each,
        "calibration": Reads(original=1 + 2 * scores + (work.held_back_tokens > 0)),
        "quantization": Reads(original=1),
        "block tuning": Reads(original=1, compressed=1),
        "end to end": Reads(original=1, compressed=1),
    }
