"""One fit: the stages in order, each skipped when its artifacts are complete.

    original -> rtn -> calibration (plan) -> blocks quantized -> blocks tuned -> end to end -> model/ and report

Every stage leaves its figures in stages/NAME.json and its tensors beside; that is what resuming reads.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any

from torch import nn

from casp_pl.allocation import CompressionPlan
from casp_pl.callbacks import Advance
from casp_pl.callbacks.environment import backend_parts
from casp_pl.callbacks.report import StageRow
from casp_pl.callbacks.stage_table import duration
from casp_pl.checkpoint import RunDirectory
from casp_pl.console import RunProgress
from casp_pl.errors import InputError, NumericsError
from casp_pl.layers import LatticeLinear
from casp_pl.memory import release_memory
from casp_pl.models.activations import ActivationStore
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.compress import LinearReport, round_to_nearest
from casp_pl.models.memory import streaming_memory
from casp_pl.modules import CalibrationModule
from casp_pl.modules.sensitivity import linear_sensitivities
from casp_pl.pipeline.block_files import LINEARS, BlockFiles, block_name, finished_blocks, save_block
from casp_pl.pipeline.blocks import Batches, Losses, quantize_blocks, tune_blocks
from casp_pl.pipeline.broken_samples import BrokenSamples
from casp_pl.pipeline.end_to_end import CHECKPOINTS, FOLDER, EndToEndStage
from casp_pl.pipeline.launch import sharing_processes
from casp_pl.pipeline.measure import Measurement, finite_row
from casp_pl.pipeline.prepare import RunBatches, load_batches, on_device
from casp_pl.pipeline.rows import show_block, show_stage, show_window
from casp_pl.pipeline.settings import RunSettings
from casp_pl.pipeline.trainers import TrainerFactory
from casp_pl.pipeline.work_time import WorkTime
from casp_pl.processes import said_by_first

__all__ = ["SENSITIVITY_BATCHES", "CompressionRun", "activation_store"]

_WORK_OF = {"quantized": "quantize", "block_tuned": "block tuning", "end_to_end": "end to end"}
SENSITIVITY_BATCHES = 4  # of the calibration: squares of gradients need fewer tokens than second moments


class CompressionRun:
    """The stages of one run on one model.

    Args:
        settings: the recipe.
        run: where artifacts are kept.
        adapter: the original model.
        measurement: evaluates a model and remembers the original's answers.
        trainers: makes each stage's Trainer.
        progress: shows how far the run is.
        measured: is called with this run when a stage has been measured.
    """

    def __init__(
        self,
        settings: RunSettings,
        run: RunDirectory,
        adapter: ModelAdapter,
        measurement: Measurement,
        trainers: TrainerFactory,
        progress: RunProgress,
        measured: Callable[["CompressionRun"], None] | None = None,
    ) -> None:
        self.settings = settings
        self.run = run
        self.adapter = adapter
        self.measurement = measurement
        self.trainers = trainers
        self.progress = progress
        self.measured = measured
        self.keep = activation_store(settings, adapter)
        self.broken = BrokenSamples(run, adapter, settings.data, trainers.autocast, self.keep)
        self.linears: list[LinearReport] = []
        self.work = WorkTime(run)
        self._started = time.monotonic()
        self._earlier = self._seconds_before()

    def stages(self, batches: RunBatches) -> BlockFiles:
        """Run (or read) all stages; returns the final blocks."""
        self.progress.say(", ".join(f"{part}: {what}" for part, what in self.backends.items()))
        if self.adapter.stored is not None:
            self.progress.say("streaming: the decoder blocks stay on disk and are read one at a time")
        self._measure("original", list(self.adapter.blocks))
        if self.settings.baseline is not None:
            self._baseline(self.settings.baseline)
        if self.trainers.working_precision is not None:
            self.progress.say(f"everything but evaluation computes in {self.trainers.working_precision}")
        plan, batches = self._plan_on_sound_samples(batches)
        blocks = self._quantize(plan, batches.calibration)
        if self.settings.block_tuning.get("epochs", 0) > 0:
            blocks = self._tune(blocks, batches.tuning, batches.held_back)
        if self.settings.end_to_end.get("steps", 0) > 0:
            blocks = self._end_to_end(blocks, batches.held_back)
        return blocks

    def _plan_on_sound_samples(self, batches: RunBatches) -> tuple[CompressionPlan, RunBatches]:
        """The plan, and the batches without the samples on which the original itself gives NaN or infinity."""
        device = self.adapter.device
        found = self.broken.recall()
        if not self.run.has("plan.json"):
            found = self.broken.search(batches.held_back) or found
        if found:
            batches = load_batches(self.settings, device)
        try:
            return self.plan(batches.calibration), batches
        except NumericsError:
            if not self.broken.search(batches.calibration):
                raise
            batches = load_batches(self.settings, device)
        return self.plan(batches.calibration), batches

    def plan(self, calibration: Batches) -> CompressionPlan:
        """The calibration pass of the original model, then ranks and bits; plan.json and calibration.safetensors."""
        settings = self.settings
        if self.run.has("plan.json") and self.run.has("calibration.safetensors"):
            self.progress.skip("calibration")
            return CompressionPlan.from_json(self.run.read_json("plan.json"))
        with self._working("calibration", len(self.adapter.blocks) * len(calibration), afresh=True):
            module = CalibrationModule(
                self.adapter,
                calibration,
                keep=self.keep,
                measure_rounding=settings.bits.score == "proxy_loss",
                sensitivity=self._sensitivity() if settings.bits.score == "sensitivity" else None,
                **settings.calibration,
            )
            callbacks = [settings.low_rank, settings.bits, Advance(self.progress.advance, loop="validation")]
            trainer = self.trainers.make(
                callbacks=callbacks, logger=False, precision=self.trainers.working_precision, limit_val_batches=1.0
            )
            trainer.validate(module, verbose=False)
        if module.statistics is None or settings.bits.plan is None:
            raise InputError("The calibration pass saw no sample: give data.samples a larger number.")
        self.run.write_tensors("calibration.safetensors", module.statistics.tensors(), {})
        # every process has made a plan, of scores that may differ in a last bit: that of the first is the run's
        plan = CompressionPlan.from_json(said_by_first(settings.bits.plan.to_json()))
        self.run.write_json("plan.json", plan.to_json())
        spent = duration(self.work_seconds()["calibration"])
        self.progress.row("calibration", f"{module.statistics.tokens:,} tokens", time=spent)
        return plan

    def _sensitivity(self) -> dict[str, float]:
        chosen = on_device(self.settings.data.first_batches(SENSITIVITY_BATCHES), self.adapter.model.device)
        return linear_sensitivities(
            self.adapter, chosen, seed=self.settings.seed, autocast=self.trainers.autocast, keep=self.keep
        )

    @cached_property
    def backends(self) -> dict[str, str]:
        """Which code this run computes with, for the console and the report."""
        transforms = issubclass(self.settings.quantizer.layer, LatticeLinear)
        return backend_parts(self.adapter.device, transforms=transforms)

    @property
    def seconds(self) -> float:
        """Wall time so far: this process and what earlier ones finished."""
        return self._earlier + time.monotonic() - self._started

    def _seconds_before(self) -> float:
        rows = self.rows()
        counted = {_WORK_OF.get(row.name) for row in rows}
        works = [seconds for stage, seconds in self.work.seconds.items() if stage not in counted]
        return sum(row.seconds or 0.0 for row in rows) + sum(works)

    def work_seconds(self) -> dict[str, float]:
        """Wall time of what is finished of the stages, without their evaluation and whichever process did it."""
        return dict(sorted(self.work.seconds.items()))  # in the order in which report.json has them

    @contextmanager
    def _working(self, stage: str, steps: float, *, afresh: bool = False) -> Iterator[None]:
        """Around the work of a stage; `afresh` where it begins with nothing that an earlier process did."""
        with self.work.stage(stage, afresh=afresh), self.progress.stage(stage, steps):
            yield

    def _piece_done(self, steps: int, note: str = "", *, found: bool) -> None:
        """A piece of the current stage, of so many of its steps, is done: just now, or `found` as it was before."""
        if found:
            self.work.recall()
            self.progress.recall(steps)
        else:
            self.work.done()
            self.progress.advance(steps, note)

    def rows(self) -> list[StageRow]:
        """Figures of the finished stages, in order."""
        names = ("original", "rtn", "quantized", "block_tuned", "end_to_end")
        return [self._row(name) for name in names if self.run.has(f"stages/{name}.json")]

    def _row(self, name: str) -> StageRow:
        stored: dict[str, Any] = self.run.read_json(f"stages/{name}.json")
        intervals = {figure: tuple(value) for figure, value in stored.items() if isinstance(value, list)}
        return StageRow(**(stored | intervals))

    def _baseline(self, quantizer: Any) -> None:
        if not self.run.has("stages/rtn.json"):
            start = time.monotonic()
            for number, block in enumerate(round_to_nearest(self.adapter, quantizer, self.settings.baseline_bits)):
                save_block(self.run, block_name("rtn", number), block)
            self._measure("rtn", BlockFiles(self.run, "rtn", self.adapter), time.monotonic() - start)
        else:
            self.progress.skip("evaluate rtn")
        self.run.discard("rtn")  # here and below also if it is all done: a run may have been killed while it deleted

    def _quantize(self, plan: CompressionPlan, calibration: Batches) -> BlockFiles:
        def done(number: int, reports: list[LinearReport]) -> None:
            self.linears.extend(reports)
            show_block(self.progress, number, reports, plan)

        with self._working("quantize", len(plan.modules)):
            quantize_blocks(
                self.run,
                self.adapter,
                plan,
                self.settings.quantization,
                self.settings.quantizer,
                calibration,
                done,
                self.trainers.autocast,
                keep=self.keep,
                linear_done=lambda report, found: self._piece_done(1, report.name.rsplit(".", 1)[-1], found=found),
            )
        self.run.discard(LINEARS)
        blocks = BlockFiles(self.run, "blocks", self.adapter)
        self._measure("quantized", blocks, self.work.seconds.get("quantize", 0.0))
        return blocks

    def _tune(self, blocks: BlockFiles, train: Batches, held_back: Batches) -> BlockFiles:
        if finished_blocks(self.run, "tuned", self.adapter) is None:
            with self._working("block tuning", len(blocks)):
                self._tune_blocks(blocks, train, held_back)
        else:
            self.progress.skip("block tuning")
        tuned = BlockFiles(self.run, "tuned", self.adapter)
        self._measure("block_tuned", tuned, self.work.seconds.get("block tuning", 0.0))
        return tuned

    def _tune_blocks(self, blocks: BlockFiles, train: Batches, held_back: Batches) -> None:
        tuning = dict(self.settings.block_tuning)
        window = tuning.pop("window")
        laps = [time.monotonic()]

        def done(numbers: range, losses: Losses, found: bool) -> None:
            laps.append(time.monotonic())
            show_window(self.progress, numbers, losses, None if found else laps[-1] - laps[-2])
            self._piece_done(len(numbers), found=found)

        tune_blocks(
            self.run,
            self.adapter,
            blocks,
            self.trainers,
            train,
            held_back,
            window=window,
            tuning=tuning,
            update=self.settings.codebook_update,
            seed=self.settings.seed,
            window_done=done,
            keep=self.keep,
        )

    def _end_to_end(self, blocks: BlockFiles, held_back: Batches) -> BlockFiles:
        if finished_blocks(self.run, FOLDER, self.adapter) is None:
            self._train_end_to_end(blocks, held_back)
        else:
            self.progress.skip("end to end")
        self.run.discard(CHECKPOINTS)
        finished = BlockFiles(self.run, FOLDER, self.adapter)
        self._measure("end_to_end", finished, self.work.seconds.get("end to end", 0.0))
        return finished

    def _train_end_to_end(self, blocks: BlockFiles, held_back: Batches) -> None:
        """On its own, so that nothing holds the stage's best state and callbacks while it is evaluated."""
        stage = EndToEndStage(
            self.settings, self.run, self.adapter, self.trainers, self.progress, self.broken, self.keep, self.work.done
        )
        with self._working("end to end", stage.steps, afresh=stage.checkpoint.step == 0):
            stage.fit(blocks, held_back)

    def _measure(self, name: str, blocks: Sequence[nn.Module], worked: float = 0.0) -> None:
        """Evaluate a stage, unless that is done; its seconds are those that it `worked` and those of the evaluation."""
        if self.run.has(f"stages/{name}.json") and self.measurement.knows(name):
            self.progress.skip(f"evaluate {name}")
            return
        begun = time.monotonic() - worked
        release_memory()  # the dense weights of an evaluation come on top of what the stage left behind
        with self.progress.stage(f"evaluate {name}", max(1, self.measurement.steps)):
            row = self.measurement.measure(name, self.adapter, blocks, self.progress.advance, started=begun)
        release_memory()
        row = finite_row(row)
        self.run.write_json(f"stages/{name}.json", asdict(row))
        show_stage(self.progress, row)
        if self.measured is not None:
            self.measured(self)


def activation_store(settings: RunSettings, adapter: ModelAdapter) -> ActivationStore:
    """Keeps activations of a run as its recipe says; `auto` leaves memory for the work on one block."""
    needed = streaming_memory(adapter)
    return ActivationStore(
        settings.activations,
        settings.run_dir,
        reserve=needed.block + needed.moments,
        sharing=sharing_processes(settings.trainer),
    )
