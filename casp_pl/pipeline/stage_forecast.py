"""Time, memory and disk of every stage, and whether this machine has them."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from json import dumps
from pathlib import Path

from casp_pl.allocation import CompressionPlan
from casp_pl.checkpoint.stored_size import ModelSize, run_file_bytes
from casp_pl.models.memory import free_memory
from casp_pl.models.surgery import layer_specs
from casp_pl.pipeline.estimate import (
    memory_by_stage,
    quick_block_costs,
    stage_weights,
    untimed_block_costs,
    workload,
)
from casp_pl.pipeline.outline import CompressedOutline
from casp_pl.pipeline.planning import BlockCosts
from casp_pl.pipeline.prepare import Prepared, is_here, on_device
from casp_pl.pipeline.probe import measured_block_costs, one_block_model
from casp_pl.pipeline.settings import RunSettings
from casp_pl.pipeline.trainers import TrainerFactory

__all__ = ["StageForecast", "disk_free", "forecast_stages", "judged_stages"]

_PROBE_BATCHES = 2
_WAYS_OUT = {
    "evaluate": "lower evaluation.images_per_batch or evaluation.windows_per_batch.",
    "calibration": "lower data.batch_size.",
    "quantize": "lower data.samples or data.text_length.",
    "block tuning": "lower block_tuning.window, data.batch_size or data.samples.",
    "end to end": "set end_to_end.activation_checkpointing, lower data.batch_size, or leave it out (steps 0).",
    "save": "close other programs.",
}
_OTHER_DISK = "free some, or give --run_dir on another one."


@dataclass(frozen=True)
class StageForecast:
    """One stage: what it takes, and whether this machine has it.

    Attributes:
        name: of the stage, as the progress bar shows it.
        seconds: expected wall time, and the interval from `seconds_low` to `seconds_high`; None where it is not known.
        seconds_low: see `seconds`.
        seconds_high: see `seconds`.
        memory_bytes: of the process at its largest.
        disk_bytes: written by this stage.
        fits: whether memory, and the disk with what earlier stages write, are free here now; None where the device is
            not here.
        way_out: what to change where it does not fit; empty where it does.
    """

    name: str
    seconds: float | None
    seconds_low: float | None
    seconds_high: float | None
    memory_bytes: int
    disk_bytes: int
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
    here = is_here(prepared.device)
    if not here:
        block = untimed_block_costs(settings, prepared, work)
    else:
        block = quick_block_costs(settings, prepared, work) if quick else _measured(settings, prepared, plan)
    weight_bytes = sum(parameter.nbytes for parameter in prepared.adapter.model.parameters())
    stages = judged_stages(
        stage_weights(settings, block, work),
        memory_by_stage(settings, prepared, work, block, weight_bytes=weight_bytes),
        _stage_disk(settings, prepared, size, outline),
        spread=block.spread if here else None,
        memory_free=free_memory(prepared.device) if here else None,
        disk_free=disk_free(settings.run_dir),
    )
    return stages, block.source


def judged_stages(
    seconds: Mapping[str, float],
    memory: Mapping[str, int],
    disk: Mapping[str, int],
    *,
    spread: float | None,
    memory_free: int | None,
    disk_free: int,
) -> tuple[StageForecast, ...]:
    """Every stage, and whether this machine has what it needs.

    Args:
        seconds: by stage, in the order in which they run.
        memory: bytes by stage; a stage that is left out needs what `evaluate quantized` needs.
        disk: bytes that a stage writes; evaluations are one entry, `evaluate`.
        spread: share by which a stage may take more or less time; None where times are not known.
        memory_free: bytes; None where the device is not here.
        disk_free: bytes.
    """
    stages, written = [], 0
    for name, expected in seconds.items():
        kind = "evaluate" if name.startswith("evaluate") else name
        needed, added = memory.get(name, memory["evaluate quantized"]), disk[kind]
        written += added
        ways = [] if memory_free is None or needed <= memory_free else [f"Memory: {_WAYS_OUT[kind]}"]
        ways += [] if written <= disk_free else [f"Disk: {_OTHER_DISK}"]
        times = (None,) * 3 if spread is None else (expected, expected * (1 - spread), expected * (1 + spread))
        fits = None if memory_free is None and not ways else not ways
        stages.append(StageForecast(name, *times, needed, added, fits, " ".join(ways)))
    return tuple(stages)


def _measured(settings: RunSettings, prepared: Prepared, plan: CompressionPlan) -> BlockCosts:
    probe = one_block_model(prepared.adapter.model, settings.seed)
    probe.model.to(prepared.device)
    batches = on_device(settings.data.first_batches(_PROBE_BATCHES), prepared.device)
    autocast = TrainerFactory(settings.trainer, None).autocast
    return measured_block_costs(probe, batches, plan, settings.quantization, settings.quantizer, autocast)


def _stage_disk(
    settings: RunSettings, prepared: Prepared, size: ModelSize, outline: CompressedOutline
) -> dict[str, int]:
    """Bytes by stage: outputs of an evaluation, spectra, three times the blocks, the model."""
    adapter, wanted = prepared.adapter, settings.evaluation.counts
    hidden = adapter.head.weight.shape[1]
    shapes = [adapter.shapes(number)[name] for number in range(len(adapter.blocks)) for name in adapter.low_rank_names]
    blocks = sum(
        run_file_bytes(dict(block.state_dict()), {"layers": dumps(layer_specs(block)), "notes": "{}"})
        for block in outline.blocks
    )
    return {
        "evaluate": (wanted["questions"] + wanted["text_tokens"]) * hidden * 4,
        "calibration": 4 * sum(map(min, shapes)),
        "quantize": blocks,
        "block tuning": blocks,
        "end to end": blocks,
        "save": size.weights + size.beside,
    }


def disk_free(run_dir: Path) -> int:
    """Bytes that are free where this directory lies, or will lie."""
    place = run_dir.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
