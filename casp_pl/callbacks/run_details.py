"""What a report shows beyond report.json: spectra and sparsity by head of the calibration, losses of TensorBoard."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from casp_pl.checkpoint import RunDirectory
from casp_pl.modules.statistics import CalibrationStatistics

__all__ = ["RunDetails", "loss_curves", "read_details"]

_LOSSES = ("block_tuning/", "end_to_end/")


@dataclass(frozen=True, kw_only=True)
class RunDetails:
    """Figures of a run that are too many for report.json.

    Attributes:
        spectra: full name of a low-rank candidate -> its whitened singular values, descending.
        head_sparsity: (L, heads, 2, 2) as in `CalibrationStatistics`; None where it was not kept.
        losses: TensorBoard tag -> (step, loss) of fine-tuning.
    """

    spectra: Mapping[str, Tensor] = field(default_factory=dict)
    head_sparsity: Tensor | None = None
    losses: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)


def read_details(run: RunDirectory) -> RunDetails:
    """What the artifacts that are there by now hold; whatever is not there yet is left empty."""
    losses = loss_curves(run.root / "tensorboard")
    if not run.has("calibration.safetensors"):
        return RunDetails(losses=losses)
    statistics = CalibrationStatistics.from_tensors(run.read_tensors("calibration.safetensors")[0])
    return RunDetails(spectra=statistics.spectra, head_sparsity=statistics.head_sparsity, losses=losses)


def loss_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The losses of block tuning and end-to-end fine-tuning by tag, from TensorBoard's event files.

    A run that was stopped and went on has logged some steps twice: where steps begin again, earlier ones are dropped.
    """
    if not folder.is_dir():
        return {}
    # half a second that other commands need not wait
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}, purge_orphaned_data=False).Reload()
    curves: dict[str, list[tuple[int, float]]] = {}
    for tag in events.Tags()[SCALARS]:
        if tag.startswith(_LOSSES):
            curve: list[tuple[int, float]] = []
            for event in events.Scalars(tag):
                if curve and event.step < curve[-1][0]:
                    curve.clear()
                curve.append((event.step, event.value))
            curves[tag] = curve
    return curves
