"""The estimate of a recipe's run, and the weights of its progress bar."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.memory import PROCESS_BYTES, Memory, streaming_memory
from casp_pl.pipeline.footprint import BlockShape, kept_activations, stage_memory, teacher_bytes
from casp_pl.pipeline.launch import processes_of
from casp_pl.pipeline.outline import compressed_bytes
from casp_pl.pipeline.planning import BlockCosts, Workload, block_costs_from_rates, effective_rate, stage_seconds
from casp_pl.pipeline.prepare import Prepared
from casp_pl.pipeline.settings import RunSettings
from casp_pl.pipeline.trainers import TrainerFactory

__all__ = [
    "RunEstimate",
    "memory_by_stage",
    "planned_estimate",
    "quick_block_costs",
    "stage_weights",
    "working_dtype",
    "workload",
]

_QUESTION_TOKENS = 24  # a question's own tokens; the image prefix is shared
_SAVE_SECONDS = 5.0


@dataclass(frozen=True)
class RunEstimate:
    """Rough, from shapes: peak memory of a process and seconds by stage."""

    memory: dict[str, Memory]
    seconds: dict[str, float]

    @property
    def total_seconds(self) -> float:
        """All stages together."""
        return sum(self.seconds.values())


def planned_estimate(settings: RunSettings, outline: Prepared) -> RunEstimate:
    """Memory and time of this recipe on this machine, before any weight is read."""
    work = workload(settings, outline.adapter)
    block = quick_block_costs(settings, outline, work)
    return RunEstimate(memory_by_stage(settings, outline, work, block), stage_weights(settings, block, work))


def memory_by_stage(settings: RunSettings, outline: Prepared, work: Workload, block: BlockCosts) -> dict[str, Memory]:
    """Memory of each process by stage, at its largest. With `auto`, activations that do not fit go to disk.

    Args:
        settings: the recipe.
        outline: the model without its weights.
        work: how much the recipe computes, in all processes together.
        block: what a block takes.
    """
    own = _own_work(work, processes_of(settings.trainer))
    stages = _stages(settings, outline, own, block, on_disk=settings.activations == "disk")
    if settings.activations == "auto" and not all(needed.within(outline.free) for needed in stages.values()):
        return _stages(settings, outline, own, block, on_disk=True)
    return stages


def _stages(
    settings: RunSettings, outline: Prepared, work: Workload, block: BlockCosts, *, on_disk: bool
) -> dict[str, Memory]:
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
            # weights are read there, and Lightning leaves a model there
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
    return TrainerFactory(settings.trainer, None).autocast or torch.float32


def quick_block_costs(settings: RunSettings, prepared: Prepared, work: Workload) -> BlockCosts:
    """What a block takes, from rates that are measured in half a second."""
    dtype = working_dtype(settings)
    rates = {kind: effective_rate(kind, prepared.device) for kind in {dtype, torch.float32}}
    return block_costs_from_rates(prepared.adapter, work, dtype=dtype, rates=rates)


def workload(settings: RunSettings, adapter: ModelAdapter) -> Workload:
    """How much this recipe computes with this model."""
    counts, wanted = settings.data.counts, settings.evaluation.counts
    tokens = counts["image_tokens"] + counts["text_tokens"]
    a_sample = tokens / max(1, counts["samples"])
    per_image = counts["image_tokens"] // max(1, counts["image_samples"])
    asked = wanted["questions"] * _QUESTION_TOKENS + wanted["images"] * per_image
    steps = settings.end_to_end.get("steps", 0)
    taught = min(steps * settings.data.batch_size, counts["fine_tuning_samples"])
    counted = counts["counted_tokens"] / max(1, counts["samples"])
    sample_bytes = _sample_bytes(settings)
    return Workload(
        blocks=len(adapter.blocks),
        tokens=tokens,
        held_back_tokens=round(a_sample * counts["held_back_samples"]),
        batch_tokens=round(a_sample * settings.data.batch_size),
        evaluation_tokens=asked + wanted["text_tokens"],
        tuning_epochs=settings.block_tuning.get("epochs", 0),
        tuning_window=settings.block_tuning.get("window", 1),
        steps=steps,
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


def stage_weights(settings: RunSettings, block: BlockCosts, work: Workload) -> dict[str, float]:
    """Stage -> expected seconds, in the order in which they run."""
    seconds: Mapping[str, float] = stage_seconds(work, block)
    share = seconds["evaluation"]
    stages = {"evaluate original": share}
    if settings.baseline is not None:
        stages["evaluate rtn"] = share
    stages |= {"calibration": seconds["calibration"], "quantize": seconds["quantization"], "evaluate quantized": share}
    if work.tuning_epochs > 0:
        stages |= {"block tuning": seconds["block tuning"], "evaluate block_tuned": share}
    if work.steps > 0:
        stages |= {"end to end": seconds["end to end"], "evaluate end_to_end": share}
    return stages | {"save": _SAVE_SECONDS}
