"""Time, memory and disk of every stage, and whether this machine has them."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from json import dumps
from pathlib import Path

from casp_pl.allocation import CompressionPlan
from casp_pl.checkpoint.stored_size import ModelSize, run_file_bytes
from casp_pl.models.memory import Memory
from casp_pl.models.surgery import layer_specs
from casp_pl.pipeline.estimate import memory_by_stage, quick_block_costs, stage_weights, workload
from casp_pl.pipeline.outline import CompressedOutline
from casp_pl.pipeline.planning import BlockCosts
from casp_pl.pipeline.prepare import Prepared, on_device
from casp_pl.pipeline.probe import measured_block_costs, one_block_model
from casp_pl.pipeline.settings import RunSettings
from casp_pl.pipeline.trainers import TrainerFactory

__all__ = ["StageForecast", "disk_free", "forecast_stages", "judged_stages", "way_out"]

_PROBE_BATCHES = 2
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
        seconds: expected wall time, and the interval from `seconds_low` to `seconds_high`.
        seconds_low: see `seconds`.
        seconds_high: see `seconds`.
        memory_bytes: of the process at its largest, on the device that computes.
        host_bytes: likewise of the host's memory beside a GPU; 0 without one.
        disk_bytes: written by this stage.
        fits: whether memory, and the disk with what earlier stages write, are free here now.
        way_out: what to change where it does not fit; empty where it does.
    """

    name: str
    seconds: float
    seconds_low: float
    seconds_high: float
    memory_bytes: int
    host_bytes: int
    disk_bytes: int
    fits: bool
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
    block = quick_block_costs(settings, prepared, work) if quick else _measured(settings, prepared, plan)
    stages = judged_stages(
        stage_weights(settings, block, work),
        memory_by_stage(settings, prepared, work, block),
        _stage_disk(settings, prepared, size, outline),
        spread=block.spread,
        memory_free=prepared.free,
        disk_free=disk_free(settings.run_dir),
    )
    return stages, block.source


def judged_stages(
    seconds: Mapping[str, float],
    memory: Mapping[str, Memory],
    disk: Mapping[str, int],
    *,
    spread: float,
    memory_free: Memory,
    disk_free: int,
) -> tuple[StageForecast, ...]:
    """Every stage, and whether this machine has what it needs.

    Args:
        seconds: by stage, in the order in which they run.
        memory: by stage; a stage that is left out needs what `evaluate quantized` needs.
        disk: bytes that a stage writes; evaluations are one entry, `evaluate`.
        spread: share by which a stage may take more or less time.
        memory_free: for each process.
        disk_free: bytes.
    """
    stages, written = [], 0
    for name, expected in seconds.items():
        kind = "evaluate" if name.startswith("evaluate") else name
        needed, added = memory.get(name, memory["evaluate quantized"]), disk[kind]
        written += added
        ways = [] if needed.device <= memory_free.device else [f"Memory: {way_out(name)}"]
        ways += [] if needed.host <= memory_free.host else [f"The host's memory: {_OTHER_MEMORY}"]
        ways += [] if written <= disk_free else [f"Disk: {_OTHER_DISK}"]
        low, high = expected * (1 - spread), expected * (1 + spread)
        stages.append(
            StageForecast(name, expected, low, high, needed.device, needed.host, added, not ways, " ".join(ways))
        )
    return tuple(stages)


def way_out(stage: str) -> str:
    """What to change where a stage needs more memory than there is."""
    return _WAYS_OUT["evaluate" if stage.startswith("evaluate") else stage]


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
