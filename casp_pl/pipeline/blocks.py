"""The two passes over the blocks: quantize one after the other, then fine-tune one after the other.

Each finished block is a file, so a run that was stopped goes on at the block where it stopped; the activations in front
of it are computed again from the files, bit by bit the same.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn

from casp_pl.allocation import CompressionPlan
from casp_pl.callbacks import BestState, CodebookUpdate
from casp_pl.checkpoint import RunDirectory
from casp_pl.errors import ResourceError
from casp_pl.layers import materialized
from casp_pl.memory import release_memory
from casp_pl.models.activations import Keep, in_memory
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.compress import BlockQuantization, LinearReport
from casp_pl.models.micro_batch import is_out_of_memory
from casp_pl.models.soundness import require_materialized
from casp_pl.models.streams import BlockBatch, first_block_batches, run_blocks, run_blocks_seeing
from casp_pl.models.surgery import require_storable
from casp_pl.modules import BlockwiseModule
from casp_pl.modules.widening import widened
from casp_pl.pipeline.block_files import BlockFiles, LinearFiles, block_name, load_block, save_block
from casp_pl.pipeline.trainers import TrainerFactory
from casp_pl.processes import process_count
from casp_pl.quantizers import Quantizer

__all__ = ["Losses", "quantize_blocks", "run_through", "tune_blocks"]

_LOG = logging.getLogger(__name__)

Batches = Sequence[dict[str, Any]]
BlockDone = Callable[[int, list[LinearReport]], None]
LinearDone = Callable[[LinearReport, bool], None]
Losses = dict[str, float | None]  # None: not finite


def quantize_blocks(
    run: RunDirectory,
    adapter: ModelAdapter,
    plan: CompressionPlan,
    quantization: BlockQuantization,
    quantizer: Quantizer,
    batches: Batches,
    block_done: BlockDone,
    autocast: torch.dtype | None = None,
    *,
    keep: Keep = in_memory,
    linear_done: LinearDone | None = None,
) -> None:
    """Quantize block after block, each behind the compressed ones before it; files blocks/NNN.safetensors.

    Args:
        run: where the blocks are kept.
        adapter: the original model.
        plan: ranks and bits.
        quantization: how a block is compressed.
        quantizer: what rounds.
        batches: calibration samples.
        block_done: is told of every block, with the reports of its linears.
        autocast: see `BlockBatch.autocast`.
        keep: keeps the inputs of blocks and linears.
        linear_done: is told of every linear, and whether an earlier run had made it.
    """
    numbers = range(len(adapter.blocks))
    if all(run.has(block_name("blocks", number)) for number in numbers):  # then nothing reads activations
        for number in numbers:
            block_done(number, _recall(run, adapter, number, linear_done)[1])
        return
    student = first_block_batches(adapter, batches, autocast, keep)
    teacher = student if quantization.follows_original else []
    with adapter.blocks_alone():
        originals = adapter.originals()
        for number in numbers:
            original = next(originals)  # zip would hold on to the one before
            name = block_name("blocks", number)
            if run.has(name):
                teacher = run_blocks(original, teacher, keep)
                block, reports = _recall(run, adapter, number, linear_done)
            else:
                teacher, references = run_blocks_seeing(original, teacher, adapter.group_heads, keep)
                finished, plans = LinearFiles(run, number, adapter.device), plan.of_block(number)
                block, reports, student = quantization.compress_block(
                    adapter, original, plans, quantizer, references, student, finished, linear_done, keep
                )
                del references
                block.requires_grad_(False)
                save_block(run, name, block, linears=[asdict(report) for report in reports])
                finished.discard()
            del original
            block_done(number, reports)
            if number + 1 < len(numbers):
                student = run_through(block, student, keep)
            del block
            release_memory()


def _recall(
    run: RunDirectory, adapter: ModelAdapter, number: int, linear_done: LinearDone | None = None
) -> tuple[nn.Module, list[LinearReport]]:
    """A quantized block, and what was reported of its linears; `linear_done` is told of them again."""
    block, notes = load_block(run, block_name("blocks", number), adapter, number)
    reports = [LinearReport(**report) for report in notes["linears"]]
    if linear_done is not None:
        for report in reports:
            linear_done(report, True)
    return block, reports


def run_through(block: nn.Module, batches: Sequence[BlockBatch], keep: Keep = in_memory) -> list[BlockBatch]:
    """`run_blocks` of a compressed block, its weights dequantized once for all batches."""
    with materialized(block):
        return run_blocks(block, batches, keep)


def tune_blocks(
    run: RunDirectory,
    adapter: ModelAdapter,
    quantized: BlockFiles,
    trainers: TrainerFactory,
    train: Batches,
    held_back: Batches,
    *,
    window: int,
    tuning: dict[str, Any],
    update: dict[str, Any],
    seed: int,
    window_done: Callable[[range, Losses, bool], None],
    keep: Keep = in_memory,
) -> None:
    """Fine-tune window after window of blocks towards the original's outputs; files tuned/NNN.safetensors.

    `window_done` is told of every window, and whether an earlier run had tuned it.
    Tables are filed as training leaves them, and end-to-end training goes on with these: rounded here, a last bit by
    which the work of several processes differs from that of one could become a step of float16.
    """
    count = len(train)
    teacher = student = first_block_batches(adapter, [*train, *held_back], trainers.autocast, keep)
    with adapter.blocks_alone():
        originals = adapter.originals()
        for first in range(0, len(adapter.blocks), window):
            numbers = range(first, min(first + window, len(adapter.blocks)))
            held_back_targets: list[list[Tensor]] = []
            for _ in numbers:
                teacher = run_blocks(next(originals), teacher, keep)
                held_back_targets.append([batch.hidden for batch in teacher[count:]])
            names = [block_name("tuned", number) for number in numbers]
            if found := all(run.has(name) for name in names):
                loaded = [load_block(run, name, adapter, number) for name, number in zip(names, numbers, strict=True)]
                tuned, losses = [block for block, _ in loaded], loaded[-1][1]
            else:
                make = partial(
                    BlockwiseModule,
                    train=list(zip(student[:count], (batch.hidden for batch in teacher[:count]), strict=True)),
                    held_back=list(zip(student[count:], zip(*held_back_targets, strict=True), strict=True)),
                    first=first,
                    seed=seed * 1000 + first,
                    **tuning,
                )
                tuned, losses = _tune_window(make, [quantized[number] for number in numbers], trainers, update)
                del make  # else the next window's targets would be made beside what this one has read
                for name, block in zip(names, tuned, strict=True):
                    require_storable(block)
                    block.eval().requires_grad_(False)
                    save_block(run, name, block, **losses)
            window_done(numbers, losses, found)
            release_memory()
            for block in tuned if numbers[-1] + 1 < len(adapter.blocks) else ():
                student = run_through(block, student, keep)


def _tune_window(
    make: Callable[[list[nn.Module]], BlockwiseModule],
    quantized: Sequence[nn.Module],
    trainers: TrainerFactory,
    update: dict[str, Any],
) -> tuple[list[nn.Module], Losses]:
    """Tuned copies of the blocks of one window, with a half, a quarter ... of a batch at a time if memory is short."""
    halvings = 0
    while True:
        tuned = [copy.deepcopy(block) for block in quantized]
        module = make(tuned)
        module.halvings = halvings
        try:
            return tuned, _fit_window(module, trainers, update)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            halvings += 1
            # the other processes would wait for this one's gradients
            if process_count() > 1 or 2**halvings > module.largest_batch:
                raise ResourceError(
                    f"Out of memory in {module.purpose}, {max(1, module.largest_batch >> (halvings - 1))} samples at a"
                    " time.\nLower data.batch_size or data.max_length, or set block_tuning.window to 1."
                ) from error
        release_memory()
        _LOG.warning("%s: out of memory; once more with 1/%d of a batch at a time", module.purpose, 2**halvings)


def _fit_window(module: BlockwiseModule, trainers: TrainerFactory, update: dict[str, Any]) -> Losses:
    require_materialized(module)
    best = BestState()
    callbacks = [best, CodebookUpdate(**update), EarlyStopping("val_loss", patience=module.patience, min_delta=0.0)]
    trainer = trainers.make(
        callbacks=callbacks,
        max_epochs=module.epochs,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        precision=trainers.working_precision,
    )
    with widened(module):
        trainer.validate(module, verbose=False)  # the state before training competes for the best
        trainer.fit(module)
    notes = best.notes()
    return {"held_back_before": notes["first"], "held_back_after": notes["best"]}
