"""The estimate of a recipe's run, and the weights of its progress bar."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.memory import PROCESS_BYTES, Memory, streaming_memory
from casp_pl.models.weight_files import tensor_files
from casp_pl.pipeline.footprint import BlockShape, kept_activations, stage_memory, teacher_bytes
from casp_pl.pipeline.launch import processes_of, sharing_processes
from casp_pl.pipeline.outline import compressed_bytes
from casp_pl.pipeline.planning import (
    BlockCosts,
    Workload,
    block_costs_from_rates,
    effective_rate,
    stage_reads,
    stage_seconds,
)
from casp_pl.pipeline.prepare import Prepared, is_here
from casp_pl.pipeline.reading import ReadCosts, measured_read_costs, reading_seconds
from casp_pl.pipeline.run import SENSITIVITY_BATCHES
from casp_pl.pipeline.settings import RunSettings
from casp_pl.pipeline.trainers import TrainerFactory

__all__ = [
    "RunEstimate",
    "planned_estimate",
    "quick_block_costs",
    "run_estimate",
    "untimed_block_costs",
    "working_dtype",
    "workload",
]

_SAVE_SECONDS = 5.0


@dataclass(frozen=True)
class RunEstimate:
    """What the stages of a run take.

    Attributes:
        memory: of each process by stage, at its largest.
        on_disk: whether activations are kept in files; with `auto`, where they do not fit into memory.
        seconds: expected, by stage, in the order in which they run.
        reads: what reading the files of a streamed model takes here; None where it is not streamed, or none is here.
    """

    memory: dict[str, Memory]
    on_disk: bool
    seconds: dict[str, float]
    reads: ReadCosts | None


def planned_estimate(settings: RunSettings, outline: Prepared) -> RunEstimate:
    """Memory and time of this recipe on this machine, before any weight is read."""
    work = workload(settings, outline.adapter)
    return run_estimate(settings, outline, work, quick_block_costs(settings, outline, work))


def run_estimate(settings: RunSettings, outline: Prepared, work: Workload, block: BlockCosts) -> RunEstimate:
    """Memory and time of a run.

    Args:
        settings: the recipe.
        outline: the model without its weights.
        work: how much the recipe computes, in all processes together.
        block: what a block takes.
    """
    own = _own_work(work, processes_of(settings.trainer))
    on_disk = settings.activations == "disk"
    memory = _memory_by_stage(settings, outline, own, block, on_disk=on_disk)
    if settings.activations == "auto" and outline.free is not None:
        on_disk = not all(needed.within(outline.free) for needed in memory.values())
        memory = _memory_by_stage(settings, outline, own, block, on_disk=on_disk)
    reads = _measured_reads(settings, outline)
    seconds = stage_seconds(work, block)
    if reads is not None:
        reading = _reading(settings, outline, block, work, reads, memory)
        seconds = {stage: value + reading[stage] for stage, value in seconds.items()}
    return RunEstimate(memory, on_disk, _in_order(settings, work, seconds), reads)


def _memory_by_stage(
    settings: RunSettings, outline: Prepared, work: Workload, block: BlockCosts, *, on_disk: bool
) -> dict[str, Memory]:
    """Of a process that has this work."""
    shape, dtype = BlockShape.of(outline.adapter), working_dtype(settings)
    codes = compressed_bytes(outline.adapter, outline.predicted, settings.quantizer)
    stages = stage_memory(shape, work, dtype, block.kept_bytes, codes)
    passing = shape.model_bytes
    if outline.streamed:
        streamed = streaming_memory(
            outline.adapter,
            window=work.tuning_window if work.tuning_epochs else 0,
            whole_compressed=work.steps > 0,
            compressed=codes / (shape.blocks * shape.weights),
        )
        stages = dict.fromkeys(stages, streamed.total + work.batches_bytes)
        passing = streamed.outside
    kept = {} if on_disk else kept_activations(shape, work, dtype)
    teacher = {} if on_disk else {"end to end": teacher_bytes(shape, work)}
    if outline.device.type == "cpu":
        return {name: Memory(PROCESS_BYTES + size + kept.get(name, 0)) for name, size in stages.items()}
    return {
        name: Memory(
            size + kept.get(name, 0) - teacher.get(name, 0),
            # weights are read there
            PROCESS_BYTES + passing + teacher.get(name, 0),
        )
        for name, size in stages.items()
    }


def _own_work(work: Workload, processes: int) -> Workload:
    """What is left for one process."""
    shared = ("tokens", "held_back_tokens", "batch_tokens", "taught_tokens", "counted_tokens", "batches_bytes",
              "taught_bytes")  # fmt: skip
    return replace(work, **{name: -(-getattr(work, name) // processes) for name in shared})


def working_dtype(settings: RunSettings) -> torch.dtype:
    """What this recipe multiplies matrices in on this machine."""
    return TrainerFactory(settings.trainer, None, weights=settings.model.dtype).autocast or torch.float32


def quick_block_costs(settings: RunSettings, prepared: Prepared, work: Workload) -> BlockCosts:
    """What a block takes, from rates that are measured in half a second."""
    kinds = {working_dtype(settings), torch.float32}
    return _costs_at(settings, prepared, work, {kind: effective_rate(kind, prepared.device) for kind in kinds})


def untimed_block_costs(settings: RunSettings, prepared: Prepared, work: Workload) -> BlockCosts:
    """What a block takes on a device that is not here: its memory is known from shapes, no time is."""
    rates = dict.fromkeys((working_dtype(settings), torch.float32), math.inf)
    return replace(_costs_at(settings, prepared, work, rates), source="nothing: there is no GPU here")


def _costs_at(
    settings: RunSettings, prepared: Prepared, work: Workload, rates: Mapping[torch.dtype, float]
) -> BlockCosts:
    name, dtype = settings.quantizer.name, working_dtype(settings)
    return block_costs_from_rates(prepared.adapter, work, quantizer=name, dtype=dtype, rates=rates)


def workload(settings: RunSettings, adapter: ModelAdapter) -> Workload:
    """How much this recipe computes with this model."""
    counts = settings.data.counts
    tokens = counts["image_tokens"] + counts["text_tokens"]
    a_sample = tokens / max(1, counts["samples"])
    batch_tokens = round(a_sample * settings.data.batch_size)
    steps = settings.end_to_end.get("steps", 0)
    taught = min(steps * settings.data.batch_size, counts["fine_tuning_samples"])
    counted = counts["counted_tokens"] / max(1, counts["samples"])
    sample_bytes = _sample_bytes(settings)
    return Workload(
        blocks=len(adapter.blocks),
        tokens=tokens,
        images=counts["image_samples"],
        held_back_tokens=round(a_sample * counts["held_back_samples"]),
        batch_tokens=batch_tokens,
        follows_original=settings.quantization.follows_original,
        scored_tokens=SENSITIVITY_BATCHES * batch_tokens if settings.bits.score == "sensitivity" else 0,
        evaluation=settings.evaluation.work,
        tuning_epochs=settings.block_tuning.get("epochs", 0),
        tuning_window=settings.block_tuning.get("window", 1),
        steps=steps,
        codes_change=settings.end_to_end.get("update_codes", False),
        taught_tokens=round(a_sample * taught),
        counted_tokens=round(counted * (taught + counts["held_back_samples"])),
        batches_bytes=round(sample_bytes * (counts["samples"] + counts["held_back_samples"])),
        taught_bytes=round(sample_bytes * taught),
    )


def _sample_bytes(settings: RunSettings) -> float:
    """Bytes of a sample's tensors; every batch holds its share of each kind of sample."""
    (batch,) = settings.data.first_batches(1)
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors) / len(batch["sample_ids"])


def _measured_reads(settings: RunSettings, outline: Prepared) -> ReadCosts | None:
    if not outline.streamed or not is_here(outline.device):
        return None
    return measured_read_costs(settings.model.directory(weights=False), getattr(torch, settings.model.dtype))


def _reading(
    settings: RunSettings,
    outline: Prepared,
    block: BlockCosts,
    work: Workload,
    costs: ReadCosts,
    memory: Mapping[str, Memory],
) -> dict[str, float]:
    """Seconds by stage that a streamed run reads files, beyond what it computes meanwhile."""
    adapter = outline.adapter
    weights = work.blocks * sum(o * i for o, i in adapter.shapes(0).values())
    outside = sum(parameter.numel() for parameter in adapter.outside_parameters())
    files = set(tensor_files(settings.model.directory(weights=False)).values())
    stored = sum(file.stat().st_size for file in files) * weights // (weights + outside)
    return reading_seconds(
        stage_reads(work, scores=work.scored_tokens > 0),
        stage_seconds(work, block),
        costs,
        original_bytes=stored,
        compressed_bytes=compressed_bytes(adapter, outline.predicted, settings.quantizer),
        dense=work.blocks * block.dense,
        cached=_stays_cached(settings, outline, stored, memory),
    )


def _stays_cached(settings: RunSettings, outline: Prepared, stored: int, memory: Mapping[str, Memory]) -> bool:
    """Whether the system has room for files of so many bytes beside the processes of this machine, which share them."""
    on_host = [needed.device if outline.device.type == "cpu" else needed.host for needed in memory.values()]
    share = stored // sharing_processes(settings.trainer)
    return outline.free is not None and share + max(on_host) < outline.free.host


def _in_order(settings: RunSettings, work: Workload, seconds: Mapping[str, float]) -> dict[str, float]:
    """Stage -> seconds, in the order in which a run has them; those that it has not are left out."""
    share = seconds["evaluation"]
    stages = {"evaluate original": seconds["evaluate original"]}
    if settings.baseline is not None:
        stages["evaluate rtn"] = seconds["evaluate rtn"]
    stages |= {"calibration": seconds["calibration"], "quantize": seconds["quantization"], "evaluate quantized": share}
    if work.tuning_epochs > 0:
        stages |= {"block tuning": seconds["block tuning"], "evaluate block_tuned": share}
    if work.steps > 0:
        stages |= {"end to end": seconds["end to end"], "evaluate end_to_end": share}
    return stages | {"save": _SAVE_SECONDS}
