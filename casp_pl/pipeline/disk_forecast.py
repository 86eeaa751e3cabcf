"""What a run writes, stage by stage: what stays, and what is gone when the stage is over."""

from dataclasses import dataclass
from json import dumps

from casp_pl.checkpoint.stored_size import ModelSize, run_file_bytes
from casp_pl.models.surgery import layer_specs
from casp_pl.pipeline.estimate import streamed_memory, streams, working_dtype
from casp_pl.pipeline.outline import CompressedOutline
from casp_pl.pipeline.planning import Workload
from casp_pl.pipeline.prepare import Prepared
from casp_pl.pipeline.settings import RunSettings

__all__ = ["StageDisk", "forecast_disk"]

_SINGLE = 4  # bytes of an activation of the residual stream


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
    weight_bytes: int,
) -> dict[str, StageDisk]:
    """By stage; evaluations are one entry, `evaluate`, but for that of the baseline.

    Args:
        settings: the recipe.
        prepared: the outline of the original.
        work: how much the recipe computes.
        size: of the model's directory.
        outline: of the compressed model.
        weight_bytes: of the original in memory.
    """
    adapter, wanted = prepared.adapter, settings.evaluation.counts
    count, hidden = len(adapter.blocks), adapter.head.weight.shape[1]
    shapes = [adapter.shapes(number)[name] for number in range(count) for name in adapter.low_rank_names]
    blocks = [
        run_file_bytes(dict(block.state_dict()), {"layers": dumps(layer_specs(block)), "notes": "{}"})
        for block in outline.blocks
    ]
    outputs = (wanted["questions"] + wanted["text_tokens"]) * hidden * _SINGLE
    stream = hidden * _SINGLE if _on_disk(settings, prepared, weight_bytes) else 0  # a token, once; 0 in memory
    read = sum(adapter.shapes(0)[name][1] for name in adapter.group_heads) * working_dtype(settings).itemsize
    all_tokens = work.tokens + work.held_back_tokens
    references = 3 * stream + (read if stream else 0)
    taught = work.steps * work.batch_tokens + work.held_back_tokens  # at most: samples come again in later epochs
    return {
        "evaluate": StageDisk(outputs),
        "evaluate rtn": StageDisk(outputs, _baseline_bytes(settings, prepared)),
        "calibration": StageDisk(_SINGLE * sum(map(min, shapes)), 2 * stream * all_tokens),
        "quantize": StageDisk(sum(blocks), max(blocks) + references * work.tokens),
        "block tuning": StageDisk(sum(blocks), 4 * stream * all_tokens),
        "end to end": StageDisk(sum(blocks), max(2 * stream * taught, _checkpoint_bytes(settings, outline))),
        "save": StageDisk(size.weights + size.beside),
    }


def _on_disk(settings: RunSettings, prepared: Prepared, weight_bytes: int) -> bool:
    """Whether activations are kept in files."""
    if settings.activations != "auto":
        return settings.activations == "disk"
    return streams(settings, prepared, weight_bytes) and streamed_memory(settings, prepared).inputs == 0


def _baseline_bytes(settings: RunSettings, prepared: Prepared) -> int:
    """Of the baseline's blocks, which are thrown away when they have been evaluated."""
    if settings.baseline is None:
        return 0
    adapter, bits = prepared.adapter, settings.baseline_bits
    shapes = [shape for number in range(len(adapter.blocks)) for shape in adapter.shapes(number).values()]
    return sum(settings.baseline.storage_bits(*shape, bits=bits) for shape in shapes) // 8


def _checkpoint_bytes(settings: RunSettings, outline: CompressedOutline) -> int:
    """Of the last checkpoint and the one before it, which goes when it is there; see `StageCheckpoint`."""
    every, steps = settings.end_to_end.get("checkpoint_every", 0), settings.end_to_end.get("steps", 0)
    if not 0 < every < steps:
        return 0
    trained = _SINGLE * sum(int(outline.model.get_parameter(name).numel()) for name in outline.trained)
    codes: int = 0
    if settings.end_to_end.get("update_codes"):
        codes = sum(buffer.nbytes for buffer in outline.blocks.buffers())
    each = int(4 * trained + 2 * codes)  # what is trained now and at its best, and two moments of Adam
    return each * (2 if steps > 2 * every else 1)
