"""What one block of the real shape takes on this machine: a model of one block with random weights does the real work.

The probe runs what a fit runs, on the first batches of the recipe's own samples. Random weights take as long as trained
ones, but for the search of AQLM's codes, whose rounds end when the loss stops falling.
"""

import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from casp_pl.allocation import CompressionPlan, ModulePlan
from casp_pl.kernels import head_divergence
from casp_pl.layers import build_layer
from casp_pl.models.adapter import ModelAdapter, adapt
from casp_pl.models.compress import BlockQuantization, collect_moments
from casp_pl.models.streams import BlockBatch, autocast_to, first_block_batches, run_blocks, run_blocks_seeing
from casp_pl.modules import BlockwiseModule
from casp_pl.modules.end_to_end import target_mask
from casp_pl.pipeline.planning import BlockCosts
from casp_pl.quantizers import Quantizer

__all__ = ["measured_block_costs", "one_block_model"]

_REPEATS = 3
_LEAST_SPREAD = 0.15  # stages of one recipe differ by this much from run to run
_SLICE_ABOVE = (
    8_000_000  # weights of a block: the search of the codes of a larger one is measured on a part of its rows
)
_SLICE_ROWS = 256


def one_block_model(model: Any, seed: int = 0) -> ModelAdapter:
    """A model like `model`, which may lie on the meta device, with a single block and random weights."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe: Any = type(model)(config)
    return adapt(probe.to(model.dtype).eval().requires_grad_(False))


def measured_block_costs(
    probe: ModelAdapter,
    batches: Sequence[dict[str, Any]],
    plan: CompressionPlan,
    quantization: BlockQuantization,
    quantizer: Quantizer,
    autocast: torch.dtype | None,
) -> BlockCosts:
    """Time what a fit does with a block.

    Args:
        probe: made by `one_block_model`, on the device of the run.
        batches: some of the recipe's own, on that device.
        plan: of the whole model; the bits and ranks that most blocks have are measured.
        quantization: settings of the block-by-block pass.
        quantizer: does the rounding.
        autocast: what matrices are multiplied in; None for the dtype of the weights.
    """
    block = probe.blocks[0]
    prefix, inputs = _timed(lambda: first_block_batches(probe, batches, autocast))
    tokens = sum(int(batch.real.sum()) for batch in inputs)
    plain = [replace(batch, autocast=None) for batch in inputs]
    forward = _repeated(lambda: run_blocks(block, inputs))
    exact = _repeated(lambda: run_blocks(block, plain)) if autocast is not None else forward
    _, references = run_blocks_seeing(block, inputs, probe.group_heads)
    moments = sum(
        _timed(partial(collect_moments, block, inputs, [seen[head] for seen in references], head))[0]
        for head in probe.group_heads
    )
    typical = _typical_block(plan)
    quantizer.quantize(torch.randn(16, 64), torch.eye(64), bits=typical[-1].bits)  # loops are compiled at first use
    quantize, compressed = _quantized(probe, typical, quantization, quantizer, references, inputs)
    pairs = [(batch, torch.randn_like(batch.hidden)) for batch in inputs]
    module = BlockwiseModule([compressed], pairs, [])
    train = _training_steps(module, pairs)
    spread = max((max(times) - min(times)) / sum(times) * len(times) / 2 for times in (forward, exact, train))
    return BlockCosts(
        exact=min(exact) / tokens,
        forward=min(forward) / tokens,
        moments=moments / tokens,
        quantize=quantize,
        train=sorted(train)[len(train) // 2],
        head=_head(probe, batches, autocast),
        prefix=prefix / tokens,
        kept_bytes=_kept_for_backward(module, pairs) / tokens,
        source="one block of this shape, measured here",
        spread=max(_LEAST_SPREAD, spread),
    )


def _typical_block(plan: CompressionPlan) -> tuple[ModulePlan, ...]:
    """The linears of the first block whose bits are those of most blocks."""
    bits = {number: tuple(module.bits for module in plan.of_block(number)) for number in plan.blocks}
    most, _ = Counter(bits.values()).most_common(1)[0]
    return plan.of_block(next(number for number, levels in bits.items() if levels == most))


def _quantized(
    probe: ModelAdapter,
    plans: Sequence[ModulePlan],
    quantization: BlockQuantization,
    quantizer: Quantizer,
    references: Sequence[dict[str, Tensor]],
    inputs: Sequence[BlockBatch],
) -> tuple[float, nn.Module]:
    """Seconds for the codes of one block, and the block."""
    block = probe.blocks[0]
    weights = sum(plan.weights for plan in plans)
    if weights <= _SLICE_ABOVE:
        compressed, reports = quantization.compress_block(probe, block, plans, quantizer, references, inputs)
        return sum(report.seconds for report in reports), compressed
    largest = max(plans, key=lambda plan: plan.weights)
    name = next(name for name in probe.linear_names if largest.name.endswith("." + name))
    largest_linear: Any = block.get_submodule(name)
    rows: Tensor = largest_linear.weight[:_SLICE_ROWS].float()
    moment = torch.eye(rows.shape[1], device=rows.device)
    seconds, _ = _timed(lambda: quantizer.quantize(rows, moment, bits=largest.bits))
    compressed = copy.deepcopy(block)
    for linear in probe.linear_names:
        original: Any = compressed.get_submodule(linear)
        shape, bias = (original.out_features, original.in_features), original.bias is not None
        spec = quantizer.layer_spec(*shape, bits=largest.bits, bias=bias)
        compressed.set_submodule(linear, build_layer(spec, device=rows.device))
    return seconds * weights / rows.numel(), compressed


def _training_steps(module: BlockwiseModule, pairs: Sequence[tuple[BlockBatch, Tensor]]) -> list[float]:
    """Seconds of every step of training: forward, backward, Adam."""
    optimizer: Any = module.configure_optimizers()["optimizer"]

    def step(pair: tuple[BlockBatch, Tensor]) -> None:
        optimizer.zero_grad()
        module.batch_loss(pair).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    step(pairs[0])  # the first one fills caches
    return [_timed(partial(step, pair))[0] for pair in [*pairs] * _REPEATS]


def _kept_for_backward(module: BlockwiseModule, pairs: Sequence[tuple[BlockBatch, Tensor]]) -> int:
    """Bytes that autograd keeps of all batches together, without the block and what it reads."""
    owned = [*module.parameters(), *module.buffers()]
    total = 0
    for pair in pairs:
        outside = {tensor.untyped_storage().data_ptr() for tensor in [*owned, pair[0].hidden, pair[1]]}
        kept: dict[int, int] = {}

        def note(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = module.batch_loss(pair)
        total += sum(size for place, size in kept.items() if place not in outside)
        del loss
    return total


def _head(probe: ModelAdapter, batches: Sequence[dict[str, Any]], autocast: torch.dtype | None) -> float:
    """Seconds for the divergence of one batch and its gradient."""
    weight = probe.head.weight
    tokens = max(1, sum(int(target_mask(batch).sum()) for batch in batches) // len(batches))
    teacher = torch.randn(tokens, weight.shape[1], device=weight.device, dtype=weight.dtype)
    student = teacher.clone().requires_grad_()
    with autocast_to(autocast, weight.device):
        return min(_repeated(lambda: head_divergence(student, teacher, weight).backward()))  # type: ignore[no-untyped-call]


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _repeated(work: Callable[[], Any]) -> list[float]:
    return [_timed(work)[0] for _ in range(_REPEATS)]
