"""Time, memory and disk of every stage, and whether this machine has them."""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from casp_pl.allocation import CompressionPlan
from casp_pl.checkpoint.stored_size import ModelSize
from casp_pl.models.memory import Memory
from casp_pl.pipeline.disk_forecast import StageDisk, forecast_disk
from casp_pl.pipeline.estimate import quick_block_costs, run_estimate, untimed_block_costs, workload
from casp_pl.pipeline.outline import CompressedOutline
from casp_pl.pipeline.planning import BlockCosts, Workload
from casp_pl.pipeline.prepare import Prepared, is_here, on_device
from casp_pl.pipeline.probe import measured_block_costs, one_block_model
from casp_pl.pipeline.reading import ReadCosts
from casp_pl.pipeline.settings import RunSettings
from casp_pl.pipeline.trainers import TrainerFactory

__all__ = ["StageForecast", "disk_free", "forecast_stages", "judged_stages", "stage_spread", "way_out"]

_PROBE_BATCHES = 2
_START_SECONDS = 5.0  # what a stage takes to start and to write, on any machine, is not measured
_KNOWN_ERRORS = {
    "evaluate": 0.3,
    "calibration": 0.4,
    "quantize": 0.2,
    "block tuning": 0.25,
    "end to end": 0.2,
    "save": 0.5,
}
_ERROR_OF_RATES = 0.5
_ERROR_OF_PARTS = 0.4  # of what is extrapolated from parts of a block
_MOST_SPREAD = 0.9
_WAYS_OUT = {
    "evaluate": "lower evaluation.images_per_batch or evaluation.windows_per_batch.",
    "calibration": "lower data.batch_size.",
    "quantize": "lower data.samples or data.text_length.",
    "block tuning": "lower block_tuning.window, data.batch_size or data.samples.",
    "end to end": "set end_to_end.activation_checkpointing, lower data.batch_size, or leave it out (steps 0).",
    "save": "close other programs.",
}
_OTHER_MEMORY = "set model.streaming to true, or activations to disk."
_OTHER_DISK = "free some, or give --run_dir on another one."


@dataclass(frozen=True)
class StageForecast:
    """One stage: what it takes, and whether this machine has it.

    Attributes:
        name: of the stage, as the progress bar shows it.
        seconds: expected wall time, and the interval from `seconds_low` to `seconds_high`; None where it is not known.
        seconds_low: see `seconds`.
        seconds_high: see `seconds`.
        memory_bytes: of the process at its largest, on the device that computes.
        host_bytes: likewise of the host's memory beside a GPU; 0 without one.
        disk_bytes: written by this stage, that stay.
        disk_passing_bytes: that are there beside these at most while it runs.
        fits: whether memory, and the disk with what earlier stages write, are free here now; None where the device is
            not here.
        way_out: what to change where it does not fit; empty where it does.
    """

    name: str
    seconds: float | None
    seconds_low: float | None
    seconds_high: float | None
    memory_bytes: int
    host_bytes: int
    disk_bytes: int
    disk_passing_bytes: int
    fits: bool | None
    way_out: str


def forecast_stages(
    settings: RunSettings,
    prepared: Prepared,
    plan: CompressionPlan,
    size: ModelSize,
    outline: CompressedOutline,
    *,
    quick: bool,
) -> tuple[tuple[StageForecast, ...], str]:
    """Every stage of a fit, and where the times come from.

    Args:
        settings: the recipe.
        prepared: made by `prepare_outline`.
        plan: rank and bits of every linear.
        size: of the model's directory.
        outline: of the compressed model.
        quick: whether times come from rates instead of a measured block.
    """
    work = workload(settings, prepared.adapter)
    block = _block_costs(settings, prepared, plan, work, quick=quick)
    estimate = run_estimate(settings, prepared, work, block)
    here = is_here(prepared.device)
    stages = judged_stages(
        estimate.seconds,
        estimate.memory,
        forecast_disk(settings, prepared, work, size, outline, on_disk=estimate.on_disk),
        spread=partial(stage_spread, block=block) if here else None,
        memory_free=prepared.free,
        disk_free=disk_free(settings.run_dir),
    )
    return stages, _source(block, estimate.reads, streamed=here and prepared.streamed)


def judged_stages(
    seconds: Mapping[str, float],
    memory: Mapping[str, Memory],
    disk: Mapping[str, StageDisk],
    *,
    spread: Callable[[str], float] | None,
    memory_free: Memory | None,
    disk_free: int,
) -> tuple[StageForecast, ...]:
    """Every stage, and whether this machine has what it needs.

    Args:
        seconds: by stage, in the order in which they run.
        memory: by stage; a stage that is left out needs what `evaluate quantized` needs.
        disk: what a stage writes; evaluations that have no entry of their own have `evaluate`.
        spread: share by which a stage may take more or less time, by its name; None where times are not known.
        memory_free: for each process; None where the device is not here.
        disk_free: bytes.
    """
    stages, written = [], 0
    for name, expected in seconds.items():
        needed = memory.get(name, memory["evaluate quantized"])
        added = disk.get(name, disk.get(_kind(name), StageDisk()))
        written += added.kept
        ways = [] if memory_free is None else _ways_to_less(name, needed, memory_free)
        ways += [] if written + added.passing <= disk_free else [f"Disk: {_OTHER_DISK}"]
        share = None if spread is None else spread(name)
        stages.append(
            StageForecast(
                name=name,
                seconds=None if share is None else expected,
                seconds_low=None if share is None else expected * (1 - share),
                seconds_high=None if share is None else expected * (1 + share) + _START_SECONDS,
                memory_bytes=needed.device,
                host_bytes=needed.host,
                disk_bytes=added.kept,
                disk_passing_bytes=added.passing,
                fits=None if memory_free is None and not ways else not ways,
                way_out=" ".join(ways),
            )
        )
    return tuple(stages)


def way_out(stage: str) -> str:
    """What to change where a stage needs more memory than there is."""
    return _WAYS_OUT[_kind(stage)]


def _ways_to_less(stage: str, needed: Memory, free: Memory) -> list[str]:
    ways = [] if needed.device <= free.device else [f"Memory: {way_out(stage)}"]
    return ways if needed.host <= free.host else [*ways, f"The host's memory: {_OTHER_MEMORY}"]


def _kind(stage: str) -> str:
    return "evaluate" if stage.startswith("evaluate") else stage


def stage_spread(stage: str, block: BlockCosts) -> float:
    """By which share of itself a stage may take more or less than it is expected to.

    Two things come together: what repeated measurements of the block differed by, and how far the forecast of such a
    stage was off where fits were compared with it (`benchmarks.plan_accuracy`).
    """
    kind = _kind(stage)
    known = _KNOWN_ERRORS[kind] if block.measured else _ERROR_OF_RATES
    if block.extrapolated and kind in ("quantize", "calibration"):
        known = _ERROR_OF_PARTS
    return min(_MOST_SPREAD, math.hypot(known, block.spread))


def _source(block: BlockCosts, reads: ReadCosts | None, *, streamed: bool) -> str:
    if not streamed:
        return block.source
    return f"{block.source}; {reads.source if reads else 'none of its files is here: reading them is not counted'}"


def _block_costs(
    settings: RunSettings, prepared: Prepared, plan: CompressionPlan, work: Workload, *, quick: bool
) -> BlockCosts:
    if not is_here(prepared.device):
        return untimed_block_costs(settings, prepared, work)
    return quick_block_costs(settings, prepared, work) if quick else _measured(settings, prepared, plan, work)


def _measured(settings: RunSettings, prepared: Prepared, plan: CompressionPlan, work: Workload) -> BlockCosts:
    probe = one_block_model(prepared.adapter.model, settings.seed)
    probe.model.to(prepared.device)
    batches = on_device(settings.data.first_batches(_PROBE_BATCHES), prepared.device)
    autocast = TrainerFactory(settings.trainer, None, weights=settings.model.dtype).autocast
    return measured_block_costs(
        probe,
        batches,
        plan,
        settings.quantization,
        settings.quantizer,
        autocast,
        answer_rows=max(1, work.evaluation.rows // max(1, work.evaluation.answered)),
        baseline=None if settings.baseline is None else (settings.baseline, settings.baseline_bits),
    )


def disk_free(run_dir: Path) -> int:
    """Bytes that are free where this directory lies, or will lie."""
    place = run_dir.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
