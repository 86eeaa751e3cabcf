"""The estimate of a recipe's run, and the weights of its progress bar."""

from casp_pl.pipeline.planning import RunEstimate, estimate_run, gemm_rate
from casp_pl.pipeline.prepare import Prepared
from casp_pl.pipeline.settings import RunSettings

__all__ = ["planned_estimate", "stage_weights"]

_QUESTION_TOKENS = 24  # a question's own tokens; the image prefix is shared


def planned_estimate(settings: RunSettings, prepared: Prepared) -> RunEstimate:
    """Memory and time of this recipe on this machine."""
    counts, wanted = settings.data.counts, settings.evaluation.counts
    tokens = counts["image_tokens"] + counts["text_tokens"]
    held_back = tokens * counts["held_back_samples"] // max(1, counts["samples"])
    per_image = counts["image_tokens"] // max(1, counts["image_samples"])
    asked = wanted["questions"] * _QUESTION_TOKENS + wanted["images"] * per_image
    return estimate_run(
        prepared.adapter,
        tokens=tokens,
        held_back_tokens=held_back,
        evaluation_tokens=asked + wanted["text_tokens"],
        tuning_epochs=settings.block_tuning.get("epochs", 0),
        steps=settings.end_to_end.get("steps", 0),
        stages=len(_evaluated(settings)),
        rate=gemm_rate(),
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
