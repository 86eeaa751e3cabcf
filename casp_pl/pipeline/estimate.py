"""The estimate of a recipe's run, and the weights of its progress bar."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.load import source_directory
from casp_pl.models.memory import StreamingMemory, free_memory, streaming_memory
from casp_pl.models.weight_files import tensor_files
from casp_pl.pipeline.footprint import BlockShape, stage_memory
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
    "measured_reads",
    "memory_by_stage",
    "planned_estimate",
    "quick_block_costs",
    "stage_weights",
    "untimed_block_costs",
    "streamed_memory",
    "streams",
    "working_dtype",
    "workload",
]

_SAVE_SECONDS = 5.0


@dataclass(frozen=True)
class RunEstimate:
    """Rough, from shapes: peak memory in bytes and seconds by stage."""

    memory_bytes: int
    seconds: dict[str, float]

    @property
    def total_seconds(self) -> float:
        """All stages together."""
        return sum(self.seconds.values())


def planned_estimate(settings: RunSettings, prepared: Prepared) -> RunEstimate:
    """Memory and time of this recipe on this machine."""
    work = workload(settings, prepared.adapter)
    block = quick_block_costs(settings, prepared, work)
    memory = max(memory_by_stage(settings, prepared, work, block).values())
    return RunEstimate(memory, stage_weights(settings, prepared, block, work, measured_reads(settings, prepared)))


def memory_by_stage(
    settings: RunSettings, prepared: Prepared, work: Workload, block: BlockCosts, *, weight_bytes: int | None = None
) -> dict[str, int]:
    """Bytes of the process by stage, at their largest; of a streamed model the largest of all stages for each.

    Args:
        settings: the recipe.
        prepared: the model.
        work: how much the recipe computes.
        block: what a block takes.
        weight_bytes: see `ModelSource.streams`.
    """
    stages = stage_memory(BlockShape.of(prepared.adapter), work, working_dtype(settings), block.kept_bytes)
    if not streams(settings, prepared, weight_bytes):
        return stages
    return dict.fromkeys(stages, streamed_memory(settings, prepared).total)


def streams(settings: RunSettings, prepared: Prepared, weight_bytes: int | None) -> bool:
    """`ModelSource.streams`; for a device that is not here, and may be of any size, only where the recipe says so."""
    if not is_here(prepared.device):
        return bool(settings.model.streaming)
    return settings.model.streams(prepared.device, weight_bytes=weight_bytes)


def streamed_memory(settings: RunSettings, prepared: Prepared) -> StreamingMemory:
    """Memory of this recipe on a streamed model; with `auto`, activations that do not fit go to disk."""
    tuned, trained = settings.block_tuning.get("epochs", 0) > 0, settings.end_to_end.get("steps", 0) > 0
    needed = streaming_memory(
        prepared.adapter,
        settings.data.counts["image_tokens"] + settings.data.counts["text_tokens"],
        dtype=working_dtype(settings),
        on_disk=settings.activations == "disk",
        window=settings.block_tuning.get("window", 1) if tuned else 0,
        whole_compressed=trained,
    )
    if settings.activations == "auto" and needed.total > free_memory(prepared.device):
        return replace(needed, inputs=0)
    return needed


def working_dtype(settings: RunSettings) -> torch.dtype:
    """What this recipe multiplies matrices in on this machine."""
    return TrainerFactory(settings.trainer, None).autocast or torch.float32


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
    return Workload(
        blocks=len(adapter.blocks),
        tokens=tokens,
        images=counts["image_samples"],
        held_back_tokens=round(a_sample * counts["held_back_samples"]),
        batch_tokens=batch_tokens,
        scored_tokens=SENSITIVITY_BATCHES * batch_tokens if settings.bits.score == "sensitivity" else 0,
        evaluation=settings.evaluation.work,
        tuning_epochs=settings.block_tuning.get("epochs", 0),
        tuning_window=settings.block_tuning.get("window", 1),
        steps=settings.end_to_end.get("steps", 0),
    )


def measured_reads(settings: RunSettings, prepared: Prepared, weight_bytes: int | None = None) -> ReadCosts | None:
    """What reading the model's files takes here; None where the run is not streamed, or none of them is here."""
    if not is_here(prepared.device) or not streams(settings, prepared, weight_bytes):
        return None
    directory = source_directory(settings.model.source, weights=False)
    return measured_read_costs(directory, getattr(torch, settings.model.dtype))


def _reading(
    settings: RunSettings, prepared: Prepared, block: BlockCosts, work: Workload, costs: ReadCosts
) -> dict[str, float]:
    """Seconds by stage that a streamed run reads files, beyond what it computes meanwhile."""
    adapter = prepared.adapter
    weights = work.blocks * sum(o * i for o, i in adapter.shapes(0).values())
    outside = sum(parameter.numel() for parameter in adapter.outside_parameters())
    files = set(tensor_files(source_directory(settings.model.source, weights=False)).values())
    stored = sum(file.stat().st_size for file in files) * weights // (weights + outside)
    return reading_seconds(
        stage_reads(work, scores=work.scored_tokens > 0),
        stage_seconds(work, block),
        costs,
        original_bytes=stored,
        compressed_bytes=int(weights * settings.bits.budget / 8),
        dense=work.blocks * block.dense,
        cached=stored + streamed_memory(settings, prepared).total < free_memory(prepared.device),
    )


def stage_weights(
    settings: RunSettings, prepared: Prepared, block: BlockCosts, work: Workload, reads: ReadCosts | None
) -> dict[str, float]:
    """Stage -> expected seconds, in the order in which they run; `reads` of a model whose blocks stay on disk."""
    seconds: Mapping[str, float] = stage_seconds(work, block)
    if reads is not None:
        reading = _reading(settings, prepared, block, work, reads)
        seconds = {stage: value + reading[stage] for stage, value in seconds.items()}
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
