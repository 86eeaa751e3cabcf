"""The estimate of a recipe's run, and the weights of its progress bar."""

import torch

from casp_pl.callbacks.report import STAGE_NAMES
from casp_pl.pipeline.planning import RunEstimate, Workload, effective_rate, estimate_run
from casp_pl.pipeline.prepare import Prepared
from casp_pl.pipeline.settings import RunSettings
from casp_pl.pipeline.trainers import TrainerFactory

__all__ = ["measured_stages", "planned_estimate", "stage_weights"]

_QUESTION_TOKENS = 24  # a question's own tokens; the image prefix is shared


def planned_estimate(settings: RunSettings, prepared: Prepared) -> RunEstimate:
    """Memory and time of this recipe on this machine."""
    dtype = TrainerFactory(settings.trainer, None).autocast or torch.float32
    rates = {kind: effective_rate(kind, prepared.device) for kind in {dtype, torch.float32}}
    return estimate_run(prepared.adapter, _workload(settings), dtype=dtype, rates=rates)


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
        evaluations=len(measured_stages(settings)),
        tuning_epochs=settings.block_tuning.get("epochs", 0),
        tuning_window=settings.block_tuning.get("window", 1),
        steps=settings.end_to_end.get("steps", 0),
    )


def stage_weights(settings: RunSettings, estimate: RunEstimate) -> dict[str, float]:
    """Stage -> expected seconds, in the order in which they run."""
    evaluated = measured_stages(settings)
    share = estimate.seconds["evaluation"] / len(evaluated)
    weights = {f"evaluate {name}": share for name in ("original", "rtn") if name in evaluated}
    weights |= {"calibration": estimate.seconds["calibration"], "quantize": estimate.seconds["quantization"]}
    weights["evaluate quantized"] = share
    if "block_tuned" in evaluated:
        weights |= {"block tuning": estimate.seconds["block tuning"], "evaluate block_tuned": share}
    if "end_to_end" in evaluated:
        weights |= {"end to end": estimate.seconds["end to end"], "evaluate end_to_end": share}
    return weights | {"save": 5.0}


def measured_stages(settings: RunSettings) -> list[str]:
    """Names of the stages of this recipe that are evaluated, in order."""
    left_out = set()
    if settings.baseline is None:
        left_out.add("rtn")
    if settings.block_tuning.get("epochs", 0) <= 0:
        left_out.add("block_tuned")
    if settings.end_to_end.get("steps", 0) <= 0:
        left_out.add("end_to_end")
    return [name for name in STAGE_NAMES if name not in left_out]
