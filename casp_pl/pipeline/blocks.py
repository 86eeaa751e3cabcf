"""The two passes over the blocks: quantize one after the other, then fine-tune one after the other.

Each finished block is a file, so a run that was stopped goes on at the block where it stopped; the activations in front
of it are computed again from the files, bit by bit the same.
"""

import copy
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn

from casp_pl.allocation import CompressionPlan
from casp_pl.callbacks import BestState, CodebookUpdate
from casp_pl.checkpoint import RunDirectory
from casp_pl.errors import ResourceError
from casp_pl.layers import materialized
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.compress import BlockQuantization, LinearReport
from casp_pl.models.micro_batch import is_out_of_memory
from casp_pl.models.soundness import require_materialized
from casp_pl.models.streams import BlockBatch, first_block_batches, run_blocks, run_blocks_seeing
from casp_pl.models.surgery import block_from_tensors, layer_specs, round_to_storage
from casp_pl.modules import BlockwiseModule
from casp_pl.pipeline.memory import release_memory
from casp_pl.pipeline.trainers import TrainerFactory
from casp_pl.processes import process_count
from casp_pl.quantizers import Quantizer

__all__ = ["load_block", "load_blocks", "quantize_blocks", "run_through", "save_block", "tune_blocks"]

_LOG = logging.getLogger(__name__)

Batches = Sequence[dict[str, Any]]
BlockDone = Callable[[int, list[LinearReport]], None]


def save_block(run: RunDirectory, name: str, block: nn.Module, **notes: Any) -> None:
    """One block as safetensors: its tensors, and in the metadata what layers it is made of."""
    metadata = {"layers": json.dumps(layer_specs(block)), "notes": json.dumps(notes)}
    run.write_tensors(name, dict(block.state_dict()), metadata)


def load_block(run: RunDirectory, name: str, original: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The block of a file and its notes."""
    tensors, metadata = run.read_tensors(name)
    block = block_from_tensors(original, json.loads(metadata["layers"]), tensors)
    return block, json.loads(metadata["notes"])


def load_blocks(run: RunDirectory, folder: str, adapter: ModelAdapter) -> list[nn.Module] | None:
    """All blocks of a folder, or None while one is missing."""
    names = [f"{folder}/{number:03d}.safetensors" for number in range(len(adapter.blocks))]
    if not all(run.has(name) for name in names):
        return None
    return [load_block(run, name, original)[0] for name, original in zip(names, adapter.blocks, strict=True)]


def quantize_blocks(
    run: RunDirectory,
    adapter: ModelAdapter,
    plan: CompressionPlan,
    quantization: BlockQuantization,
    quantizer: Quantizer,
    batches: Batches,
    block_done: BlockDone,
    autocast: torch.dtype | None = None,
) -> list[nn.Module]:
    """Quantize block after block, each behind the compressed ones before it; files blocks/NNN.safetensors."""
    blocks: list[nn.Module] = []
    complete = all(run.has(_quantized_name(number)) for number in range(len(adapter.blocks)))
    # where no block is missing, nothing reads activations
    teacher = student = [] if complete else first_block_batches(adapter, batches, autocast)
    for number, original in enumerate(adapter.blocks):
        name = _quantized_name(number)
        if run.has(name):
            teacher = run_blocks(original, teacher)
            block, notes = load_block(run, name, original)
            reports = [LinearReport(**report) for report in notes["linears"]]
        else:
            teacher, references = run_blocks_seeing(original, teacher, adapter.group_heads)
            block, reports = quantization.compress_block(
                adapter, original, plan.of_block(number), quantizer, references, student
            )
            del references
            round_to_storage(block)
            block.requires_grad_(False)
            save_block(run, name, block, linears=[asdict(report) for report in reports])
        block_done(number, reports)
        blocks.append(block)
        if number + 1 < len(adapter.blocks):
            student = run_through(block, student)
    return blocks


def _quantized_name(number: int) -> str:
    return f"blocks/{number:03d}.safetensors"


def run_through(block: nn.Module, batches: Sequence[BlockBatch]) -> list[BlockBatch]:
    """`run_blocks` of a compressed block, its weights dequantized once for all batches."""
    with materialized(block):
        return run_blocks(block, batches)


def tune_blocks(
    run: RunDirectory,
    adapter: ModelAdapter,
    quantized: Sequence[nn.Module],
    trainers: TrainerFactory,
    train: Batches,
    held_back: Batches,
    *,
    window: int,
    tuning: dict[str, Any],
    update: dict[str, Any],
    seed: int,
    window_done: Callable[[range, dict[str, float]], None],
) -> list[nn.Module]:
    """Fine-tune window after window of blocks towards the original's outputs; files tuned/NNN.safetensors."""
    blocks: list[nn.Module] = []
    count = len(train)
    teacher = student = first_block_batches(adapter, [*train, *held_back], trainers.autocast)
    for first in range(0, len(adapter.blocks), window):
        numbers = range(first, min(first + window, len(adapter.blocks)))
        originals = [adapter.blocks[number] for number in numbers]
        held_back_targets = []
        for original in originals:
            teacher = run_blocks(original, teacher)
            held_back_targets.append([batch.hidden for batch in teacher[count:]])
        names = [f"tuned/{number:03d}.safetensors" for number in numbers]
        if all(run.has(name) for name in names):
            loaded = [load_block(run, name, original) for name, original in zip(names, originals, strict=True)]
            tuned, losses = [block for block, _ in loaded], loaded[-1][1]
        else:
            pairs = [(batch, target.hidden) for batch, target in zip(student[:count], teacher[:count], strict=True)]
            held = list(zip(student[count:], zip(*held_back_targets, strict=True), strict=True))
            window_of = partial(BlockwiseModule, train=pairs, held_back=held, first=first, **tuning)
            before = [quantized[number] for number in numbers]
            tuned, losses = _tune_window(partial(window_of, seed=seed * 1000 + first), before, trainers, update)
            for name, block in zip(names, tuned, strict=True):
                round_to_storage(block)
                block.eval().requires_grad_(False)
                save_block(run, name, block, **losses)
        window_done(numbers, losses)
        release_memory()
        blocks += tuned
        for block in tuned if numbers[-1] + 1 < len(adapter.blocks) else ():
            student = run_through(block, student)
    return blocks


def _tune_window(
    make: Callable[[list[nn.Module]], BlockwiseModule],
    quantized: Sequence[nn.Module],
    trainers: TrainerFactory,
    update: dict[str, Any],
) -> tuple[list[nn.Module], dict[str, float]]:
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


def _fit_window(module: BlockwiseModule, trainers: TrainerFactory, update: dict[str, Any]) -> dict[str, float]:
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
    trainer.validate(module, verbose=False)  # the state before training competes for the best
    trainer.fit(module)
    return {"held_back_before": best.first, "held_back_after": best.best}
