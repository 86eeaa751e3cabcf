"""What a run writes, stage by stage: what stays, and what is gone when the stage is over."""

from dataclasses import dataclass
from json import dumps

from casp_pl.checkpoint.stored_size import ModelSize, run_file_bytes
from casp_pl.models.surgery import layer_specs
from casp_pl.pipeline.estimate import working_dtype
from casp_pl.pipeline.footprint import BlockShape, kept_activations, teacher_bytes
from casp_pl.pipeline.outline import CompressedOutline
from casp_pl.pipeline.planning import Workload
from casp_pl.pipeline.prepare import Prepared
from casp_pl.pipeline.settings import RunSettings

__all__ = ["StageDisk", "forecast_disk"]

_SINGLE = 4  # bytes of a number in float32


@dataclass(frozen=True)
class StageDisk:
    """Bytes that one stage writes.

    Attributes:
        kept: that stay in the run directory.
        passing: that are there at most beside these while the stage runs.
    """

    kept: int = 0
    passing: int = 0


def forecast_disk(
    settings: RunSettings,
    prepared: Prepared,
    work: Workload,
    size: ModelSize,
    outline: CompressedOutline,
    *,
    on_disk: bool,
) -> dict[str, StageDisk]:
    """By stage; evaluations are one entry, `evaluate`, but for that of the baseline.

    Args:
        settings: the recipe.
        prepared: the outline of the original.
        work: how much the recipe computes, in all processes together.
        size: of the model's directory.
        outline: of the compressed model.
        on_disk: whether activations are kept in files.
    """
    adapter, wanted, shape = prepared.adapter, settings.evaluation.counts, BlockShape.of(prepared.adapter)
    kept = kept_activations(shape, work, working_dtype(settings)) if on_disk else {}
    taught = teacher_bytes(shape, work) if on_disk else 0  # is still there while checkpoints are
    widths = [adapter.shapes(number)[name] for number in range(shape.blocks) for name in adapter.low_rank_names]
    blocks = [
        run_file_bytes(dict(block.state_dict()), {"layers": dumps(layer_specs(block)), "notes": "{}"})
        for block in outline.blocks
    ]
    outputs = (wanted["questions"] + wanted["text_tokens"]) * shape.hidden * _SINGLE
    return {
        "evaluate": StageDisk(outputs),
        "evaluate rtn": StageDisk(outputs, _baseline_bytes(settings, prepared)),
        "calibration": StageDisk(_SINGLE * sum(map(min, widths)), kept.get("calibration", 0)),
        "quantize": StageDisk(sum(blocks), max(blocks) + kept.get("quantize", 0)),
        "block tuning": StageDisk(sum(blocks), kept.get("block tuning", 0)),
        "end to end": StageDisk(
            sum(blocks), max(kept.get("end to end", 0), taught + _checkpoint_bytes(settings, outline))
        ),
        "save": StageDisk(size.weights + size.beside),
    }


def _baseline_bytes(settings: RunSettings, prepared: Prepared) -> int:
    """Of the baseline's blocks, which are thrown away when they have been evaluated."""
    if settings.baseline is None:
        return 0
    adapter, bits = prepared.adapter, settings.baseline_bits
    return sum(
        settings.baseline.for_module(adapter.full_name(number, name)).storage_bits(*shape, bits=bits)
        for number in range(len(adapter.blocks))
        for name, shape in adapter.shapes(number).items()
    ) // 8  # fmt: skip


def _checkpoint_bytes(settings: RunSettings, outline: CompressedOutline) -> int:
    """Of the one that a stop leaves, beside the last of those made on the way; see `StageCheckpoint`."""
    every, steps = settings.end_to_end.get("checkpoint_every", 0), settings.end_to_end.get("steps", 0)
    trained = _SINGLE * sum(int(outline.model.get_parameter(name).numel()) for name in outline.trained)
    codes: int = 0
    if settings.end_to_end.get("update_codes"):
        codes = sum(buffer.nbytes for buffer in outline.blocks.buffers())
    each = int(4 * trained + 2 * codes)  # what is trained now and at its best, and two moments of Adam
    return each * (2 if 0 < every < steps else 1)
