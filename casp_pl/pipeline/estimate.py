"""The estimate of a recipe's run, and the weights of its progress bar."""

from dataclasses import replace

import torch

from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.memory import StreamingMemory, streaming_memory
from casp_pl.pipeline.planning import RunEstimate, Workload, effective_rate, estimate_run
from casp_pl.pipeline.prepare import Prepared
from casp_pl.pipeline.settings import RunSettings
from casp_pl.pipeline.trainers import TrainerFactory

__all__ = ["planned_estimate", "stage_weights", "streamed_memory"]

_QUESTION_TOKENS = 24  # a question's own tokens; the image prefix is shared


def planned_estimate(settings: RunSettings, prepared: Prepared) -> RunEstimate:
    """Memory and time of this recipe on this machine."""
    dtype = TrainerFactory(settings.trainer, None).autocast or torch.float32
    rates = {kind: effective_rate(kind, prepared.device) for kind in {dtype, torch.float32}}
    estimate = estimate_run(prepared.adapter, _workload(settings), dtype=dtype, rates=rates)
    if prepared.adapter.stored is None:
        return estimate
    return replace(estimate, memory_bytes=streamed_memory(settings, prepared.adapter, dtype).total)


def streamed_memory(settings: RunSettings, adapter: ModelAdapter, dtype: torch.dtype) -> StreamingMemory:
    """Memory of this recipe on a streamed model; activations that do not fit go to disk, so they are not asked for."""
    tuned, trained = settings.block_tuning.get("epochs", 0) > 0, settings.end_to_end.get("steps", 0) > 0
    return streaming_memory(
        adapter,
        settings.data.counts["image_tokens"] + settings.data.counts["text_tokens"],
        dtype=dtype,
        on_disk=settings.activations != "memory",
        window=settings.block_tuning.get("window", 1) if tuned else 0,
        whole_compressed=trained,
    )


def _workload(settings: RunSettings) -> Workload:
    counts, wanted = settings.data.counts, settings.evaluation.counts
    tokens = counts["image_tokens"] + counts["text_tokens"]
    a_sample = tokens / max(1, counts["samples"])
    per_image = counts["image_tokens"] // max(1, counts["image_samples"])
    asked = wanted["questions"] * _QUESTION_TOKENS + wanted["images"] * per_image
    return Workload(
        tokens=tokens,
        held_back_tokens=round(a_sample * counts["held_back_samples"]),
        batch_tokens=round(a_sample * settings.data.batch_size),
        evaluation_tokens=asked + wanted["text_tokens"],
        evaluations=len(_evaluated(settings)),
        tuning_epochs=settings.block_tuning.get("epochs", 0),
        tuning_window=settings.block_tuning.get("window", 1),
        steps=settings.end_to_end.get("steps", 0),
    )


def stage_weights(settings: RunSettings, estimate: RunEstimate) -> dict[str, float]:
    """Stage -> expected seconds, in the order in which they run."""
    evaluated = _evaluated(settings)
    share = estimate.seconds["evaluation"] / len(evaluated)
    weights = {f"evaluate {name}": share for name in ("original", "rtn") if name in evaluated}
    weights |= {"calibration": estimate.seconds["calibration"], "quantize": estimate.seconds["quantization"]}
    weights["evaluate quantized"] = share
    if "block_tuned" in evaluated:
        weights |= {"block tuning": estimate.seconds["block tuning"], "evaluate block_tuned": share}
    if "end_to_end" in evaluated:
        weights |= {"end to end": estimate.seconds["end to end"], "evaluate end_to_end": share}
    return weights | {"save": 5.0}


def _evaluated(settings: RunSettings) -> list[str]:
    names = ["original", "quantized"]
    names += ["rtn"] if settings.baseline is not None else []
    names += ["block_tuned"] if settings.block_tuning.get("epochs", 0) > 0 else []
    names += ["end_to_end"] if settings.end_to_end.get("steps", 0) > 0 else []
    return names
