"""Everything that is known of a run before it starts: bits, ranks, sizes, memory, disk and time of every stage.

Sizes are exact once ranks and bits are, and those are after calibration (plan.json). Before it, measured scores and
spectra are missing: the first and last blocks stand in for the scores, equal ranks for spectral ones.
"""

from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from casp_pl.allocation import CompressionPlan
from casp_pl.checkpoint import RunDirectory
from casp_pl.checkpoint.manifest import MANIFEST_NAME
from casp_pl.checkpoint.stored_size import ModelSize, model_size
from casp_pl.pipeline.bit_forecast import CurveEntry, GroupForecast, forecast_bits
from casp_pl.pipeline.outline import compressed_outline
from casp_pl.pipeline.prepare import Prepared, prepare_outline, wanted_device
from casp_pl.pipeline.settings import RunSettings
from casp_pl.pipeline.stage_forecast import StageForecast, disk_free, forecast_stages

__all__ = ["RunForecast", "forecast_run"]


@dataclass(frozen=True)
class RunForecast:
    """What `plan` says.

    Attributes:
        plan: rank and bits of every linear.
        plan_from: `plan.json` of a run that has calibrated, or `prediction`.
        size: of the model's directory.
        size_is_exact: whether weights_bytes is what the file will have; `size_note` says why not.
        size_note: see `size_is_exact`.
        original_bytes: of the original's parameters, at 16 bits each.
        stages: in the order in which they run.
        seconds_from: where times come from.
        memory_free: bytes that each process can have, on the device that computes; None where it is not here.
        disk_free: bytes that are free where the run directory lies.
        groups: by block or linear, as bits are given out.
        curve: size against predicted error, by rising size.
    """

    plan: CompressionPlan
    plan_from: str
    size: ModelSize
    size_is_exact: bool
    size_note: str
    original_bytes: int
    stages: tuple[StageForecast, ...]
    seconds_from: str
    memory_free: int | None
    disk_free: int
    groups: tuple[GroupForecast, ...]
    curve: tuple[CurveEntry, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, for `json.dumps`."""
        value = asdict(self) | {"plan": self.plan.to_json()}
        return value | {"seconds": self.seconds, "memory_bytes": self.memory_bytes, "disk_bytes": self.disk_bytes}

    @property
    def seconds(self) -> float | None:
        """Of all stages; None where it is not known."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if known else None

    @property
    def memory_bytes(self) -> int:
        """Of the largest stage."""
        return max(stage.memory_bytes for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        """At most, with what earlier stages have left."""
        kept = accumulate(stage.disk_bytes for stage in self.stages)
        return max(left + stage.disk_passing_bytes for left, stage in zip(kept, self.stages, strict=True))


def forecast_run(settings: RunSettings, *, quick: bool = False) -> RunForecast:
    """Forecast a fit. Reads configs, headers, the samples, and plan.json where there is one; writes nothing.

    Where the recipe asks for a GPU that is not here, no time is told.

    Args:
        settings: the recipe.
        quick: times from the rates of a matrix product, instead of measuring one block of the real shape.

    Raises:
        ConfigError: a budget that cannot be met.
        InputError: the model or the data cannot be read.
    """
    prepared = prepare_outline(settings, wanted_device(settings))
    plan, plan_from = _plan(settings, prepared)
    outline = compressed_outline(prepared.adapter, plan, settings.quantizer)
    tunes = settings.block_tuning.get("epochs", 0) > 0 or settings.end_to_end.get("steps", 0) > 0
    trained = outline.trained if tunes else frozenset()
    prefix = f"{prepared.adapter.decoder_name}.layers." if prepared.streamed else None
    size = model_size(outline.model, prepared.processor, prepared.headers, trained=trained, block_prefix=prefix)
    note = _size_note(settings, size, plan_from)
    stages, seconds_from = forecast_stages(settings, prepared, plan, size, outline, quick=quick)
    groups, curve = forecast_bits(plan, settings.quantizer, settings.bits.granularity, size.weights)
    return RunForecast(
        plan=plan,
        plan_from=plan_from,
        size=size,
        size_is_exact=not note,
        size_note=note,
        original_bytes=2 * sum(parameter.numel() for parameter in prepared.adapter.model.parameters()),
        stages=stages,
        seconds_from=seconds_from,
        memory_free=None if prepared.free is None else prepared.free.device,
        disk_free=disk_free(settings.run_dir),
        groups=groups,
        curve=curve,
    )


def _plan(settings: RunSettings, prepared: Prepared) -> tuple[CompressionPlan, str]:
    if (settings.run_dir / MANIFEST_NAME).is_file():
        run = RunDirectory.read_only(settings.run_dir)
        if run.fingerprint.get("recipe") == settings.flat and run.has("plan.json"):
            return CompressionPlan.from_json(run.read_json("plan.json")), str(settings.run_dir / "plan.json")
    return prepared.predicted, "prediction"


def _size_note(settings: RunSettings, size: ModelSize, plan_from: str) -> str:
    reasons = []
    measured_scores = settings.bits.score in ("block_influence", "sensitivity", "proxy_loss")
    if plan_from == "prediction" and settings.low_rank.mode == "spectral":
        reasons.append("calibration chooses the ranks (low_rank.mode: spectral)")
    elif plan_from == "prediction" and measured_scores and settings.bits.granularity == "linear":
        reasons.append("calibration chooses the bits of single linears")
    elif plan_from == "prediction" and measured_scores:
        reasons.append("calibration chooses which blocks get more bits: the file's header may differ by some bytes")
    if size.undecided:
        reasons.append(f"float32 tensors that fit into 16 bits are stored so: up to {size.undecided} bytes less")
    if size.mixed:
        reasons.append("the original has float16 and bfloat16: the file's header may differ by some bytes")
    return "; ".join(reasons)
