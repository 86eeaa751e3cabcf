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
from casp_pl.layers import build_layer, materialized
from casp_pl.linalg import GramSum
from casp_pl.models.adapter import ModelAdapter, adapt
from casp_pl.models.compress import BlockQuantization, LinearReport, collect_moments
from casp_pl.models.streams import (
    BlockBatch,
    autocast_to,
    closing_linears_of,
    first_block_batches,
    reach,
    run_blocks,
    run_blocks_seeing,
)
from casp_pl.modules import BlockwiseModule
from casp_pl.modules.end_to_end import target_mask
from casp_pl.modules.widening import widened
from casp_pl.pipeline.outline import module_spec
from casp_pl.pipeline.planning import BlockCosts
from casp_pl.pipeline.probe_quantizing import SHARES, extrapolated, part_seconds, spectrum_seconds
from casp_pl.quantizers import Quantizer

__all__ = ["measured_block_costs", "one_block_model"]

_REPEATS = 3
_ENOUGH = 4.0  # seconds: what takes longer is not repeated
_PARTS_ABOVE = 8_000_000  # weights of a block: a larger one is quantized in parts
_OF_PARTS = f", its quantization on {' and '.join(f'1/{1 / share:.0f}' for share in SHARES)} of its width"


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
    *,
    answer_rows: int = 1,
    baseline: tuple[Quantizer, int] | None = None,
) -> BlockCosts:
    """Time what a fit does with a block.

    Args:
        probe: made by `one_block_model`, on the device of the run.
        batches: some of the recipe's own, on that device.
        plan: of the whole model; the bits and ranks that most blocks have are measured.
        quantization: settings of the block-by-block pass.
        quantizer: does the rounding.
        autocast: what matrices are multiplied in; None for the dtype of the weights.
        answer_rows: questions that are answered together.
        baseline: what the fit is compared with, and its bits.
    """
    block = probe.blocks[0]
    prefix, inputs = _timed(lambda: first_block_batches(probe, batches, autocast))
    images = sum(int(probe.image_mask(batch["input_ids"]).any(1).sum()) for batch in batches)
    tokens = sum(int(batch.real.sum()) for batch in inputs)
    plain = [replace(batch, autocast=None) for batch in inputs]
    forward = _repeated(lambda: run_blocks(block, inputs))
    exact = _repeated(lambda: run_blocks(block, plain)) if autocast is not None else forward
    _, references = run_blocks_seeing(block, inputs, probe.group_heads)
    moments = _passing_through(probe, quantization, inputs, references)
    typical = _typical_block(plan, quantizer)
    large = sum(module.weights for module in typical) > _PARTS_ABOVE
    quantize, compressed = _quantized(probe, typical, quantization, quantizer, references, inputs, moments, large)
    values = partial(spectrum_seconds, probe, references)
    pairs = [(batch, torch.randn_like(batch.hidden)) for batch in inputs]
    module = BlockwiseModule([compressed], pairs, [])
    train, kept_bytes = _training(module, pairs)
    spread = max((max(times) - min(times)) / sum(times) * len(times) / 2 for times in (forward, exact, *train))
    return BlockCosts(
        exact=min(exact) / tokens,
        forward=min(forward) / tokens,
        answer=_answering(probe, answer_rows),
        spectra=_second_moment([seen[probe.group_heads[0]] for seen in references]) / tokens,
        values=extrapolated(values) if large else values(1.0),
        moments=moments / tokens,
        quantize=quantize,
        baseline=0.0 if baseline is None else _rounding(probe, *baseline),
        dense=min(_repeated(partial(_make_dense, compressed))),
        train=sum(map(min, train)) / len(train),
        head=_head(probe, batches, autocast),
        logits=_logits(probe, inputs) / tokens,
        vision=prefix / images if images else 0.0,
        kept_bytes=kept_bytes / tokens,
        source="one block of this shape, measured here" + (_OF_PARTS if large else ""),
        spread=spread,
        measured=True,
        extrapolated=large,
    )


def _quantized(
    probe: ModelAdapter,
    plans: Sequence[ModulePlan],
    quantization: BlockQuantization,
    quantizer: Quantizer,
    references: Sequence[dict[str, Tensor]],
    inputs: Sequence[BlockBatch],
    moments: float,
    large: bool,
) -> tuple[float, nn.Module]:
    """Seconds for all that is done with the weights of a block, without `_passing_through`, and the block."""
    quantizer.quantize(torch.randn(16, 64), torch.eye(64), bits=plans[-1].bits)  # loops are compiled at first use
    if large:
        seconds = extrapolated(partial(part_seconds, probe, plans, quantization, quantizer, references))
        return seconds, _empty_block(probe, plans, quantizer)

    def work() -> tuple[nn.Module, list[LinearReport]]:
        own = [dict(seen) for seen in references]
        block, reports, reached = quantization.compress_block(probe, probe.blocks[0], plans, quantizer, own, inputs)
        with materialized(block):
            run_blocks(block, reached)
        return block, reports

    seconds, (compressed, reports) = _timed(work)
    return max(seconds - moments, sum(report.seconds for report in reports)), compressed


def _passing_through(
    probe: ModelAdapter,
    quantization: BlockQuantization,
    inputs: Sequence[BlockBatch],
    references: Sequence[dict[str, Tensor]],
) -> float:
    """Seconds for what a block's quantization does without its weights: moments of all groups, and its outputs."""
    block = probe.blocks[0]
    closing = closing_linears_of(block, inputs, probe.group_heads)  # once a block, not a batch: told with the weights

    def work() -> None:
        reached = inputs
        for head in probe.group_heads:
            if head in closing:
                reached = reach(block, reached, head, closing[head])
            seen = [seen[head] for seen in references] if quantization.follows_original else None
            collect_moments(block, reached, seen, head, quantization.token_limit)
        run_blocks(block, reached)

    return _timed(work)[0]


def _typical_block(plan: CompressionPlan, quantizer: Quantizer) -> tuple[ModulePlan, ...]:
    """The linears of the first block whose bits, and settings that go by names, are those of most blocks."""
    work = {
        number: tuple((module.bits, quantizer.for_module(module.name)) for module in plan.of_block(number))
        for number in plan.blocks
    }
    most, _ = Counter(work.values()).most_common(1)[0]
    return plan.of_block(next(number for number, own in work.items() if own == most))


def _empty_block(probe: ModelAdapter, plans: Sequence[ModulePlan], quantizer: Quantizer) -> nn.Module:
    """The block with compressed layers in place whose codes mean nothing: they take as long to train and to read."""
    block = copy.deepcopy(probe.blocks[0])
    for plan in plans:
        name = next(name for name in probe.linear_names if plan.name.endswith("." + name))
        linear: Any = block.get_submodule(name)
        block.set_submodule(name, build_layer(module_spec(plan, linear, quantizer), device=linear.weight.device))
    return block


@torch.no_grad()
def _answering(probe: ModelAdapter, rows: int) -> float:
    """Seconds for the linears of a block on one token of every question that is answered together."""
    linears: list[Any] = [probe.blocks[0].get_submodule(name) for name in probe.linear_names]
    inputs = [torch.randn(rows, linear.in_features).to(linear.weight) for linear in linears]
    return min(_repeated(lambda: [linear(x) for linear, x in zip(linears, inputs, strict=True)]))


def _second_moment(seen: Sequence[Tensor]) -> float:
    """Seconds for the second moment of what a group reads."""
    total = GramSum(seen[0].shape[1], seen[0].device)

    def add_all() -> None:
        for x in seen:
            total.add(x.float())

    return min(_repeated(add_all))


def _rounding(probe: ModelAdapter, baseline: Quantizer, bits: int) -> float:
    """Seconds to round a block without calibration, from its first linear."""
    linear: Any = probe.blocks[0].get_submodule(probe.linear_names[0])
    identity = torch.eye(linear.in_features, device=linear.weight.device)
    seconds, _ = _timed(lambda: baseline.quantize(linear.weight, identity, bits=bits))
    weights = sum(rows * columns for rows, columns in probe.shapes(0).values())
    return float(seconds * weights / linear.weight.numel())


def _make_dense(block: nn.Module) -> None:
    with materialized(block):
        pass


@torch.no_grad()
def _logits(probe: ModelAdapter, inputs: Sequence[BlockBatch]) -> float:
    """Seconds for the logits of all tokens of these batches."""
    hidden = [batch.hidden[batch.real].to(probe.head.weight) for batch in inputs]
    return min(_repeated(lambda: [probe.head(part) for states in hidden for part in torch.split(states, 512)]))


def _training(module: BlockwiseModule, pairs: Sequence[tuple[BlockBatch, Tensor]]) -> tuple[list[list[float]], int]:
    """`_training_steps` and `_kept_for_backward`, in float32 as a fit trains."""
    with widened(module):
        return _training_steps(module, pairs), _kept_for_backward(module, pairs)


def _training_steps(module: BlockwiseModule, pairs: Sequence[tuple[BlockBatch, Tensor]]) -> list[list[float]]:
    """Seconds of every step of training, forward, backward and Adam, by batch."""
    optimizer: Any = module.configure_optimizers()["optimizer"]

    def step(pair: tuple[BlockBatch, Tensor]) -> None:
        optimizer.zero_grad()
        module.batch_loss(pair).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    step(pairs[0])  # the first one fills caches
    return [_repeated(partial(step, pair)) for pair in pairs]


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
    times = [_timed(work)[0]]
    while len(times) < _REPEATS and sum(times) < _ENOUGH:
        times.append(_timed(work)[0])
    return times
