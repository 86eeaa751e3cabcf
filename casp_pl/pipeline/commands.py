"""What each subcommand does with a parsed recipe. Every function returns the exit code."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from casp_pl.callbacks import Advance
from casp_pl.callbacks.report import CompressionReport, StageRow
from casp_pl.callbacks.report_files import write_report
from casp_pl.callbacks.run_details import read_details
from casp_pl.callbacks.stage_table import print_stages, size
from casp_pl.callbacks.tensorboard import log_report
from casp_pl.checkpoint import RunDirectory, load_compressed, save_compressed, write_text
from casp_pl.checkpoint import verify as find_problems
from casp_pl.console import RunProgress, make_console, print_table
from casp_pl.errors import InputError, ResourceError
from casp_pl.evaluation import StageFigures
from casp_pl.export import export_model
from casp_pl.models.adapter import adapt
from casp_pl.modules.evaluation import EvaluationModule
from casp_pl.pipeline.estimate import planned_estimate, stage_weights
from casp_pl.pipeline.launch import launch
from casp_pl.pipeline.measure import Measurement, bits_per_weight
from casp_pl.pipeline.predict import answer
from casp_pl.pipeline.prepare import Prepared, fingerprint, load_batches, prepare
from casp_pl.pipeline.reporting import build_report, model_card, render_again
from casp_pl.pipeline.run import CompressionRun
from casp_pl.pipeline.settings import RunSettings
from casp_pl.pipeline.trainers import TrainerFactory
from casp_pl.processes import is_first, process_count, said_by_first

__all__ = ["export", "fit", "plan", "predict", "report", "test", "validate", "verify"]


def fit(settings: RunSettings, *, override_memory: bool = False) -> int:
    """Compress, fine-tune, evaluate and save; goes on where an earlier run of the same recipe stopped."""
    launch(settings.trainer)
    prepared = prepare(settings)
    estimate = planned_estimate(settings, prepared)
    _check_memory(estimate.memory_bytes, settings, override_memory)
    with RunDirectory.open(settings.run_dir, fingerprint(settings, prepared)) as run:
        if is_first():
            write_text(run.path("config.yaml"), settings.recipe)
        weights = stage_weights(settings, estimate)
        with RunProgress(weights, enabled=is_first(), verbose=settings.verbose) as progress:
            report = _fit(settings, prepared, run, progress)
    if is_first():
        console = make_console()
        print_stages(report.stages, console)
        console.print(f"model:  {run.path('model')}\nreport: {run.path('report.html')}", markup=False, soft_wrap=True)
    return 0


def _fit(settings: RunSettings, prepared: Prepared, run: RunDirectory, progress: RunProgress) -> CompressionReport:
    logger = TensorBoardLogger(str(settings.run_dir), name="tensorboard", version="")
    trainers = TrainerFactory(settings.trainer, logger)
    measurement = Measurement(run, settings.evaluation, prepared.processor, trainers)

    def report_now(done: CompressionRun) -> CompressionReport:
        return build_report(settings, run, done.rows(), done.linears, measurement, done.seconds)

    def show(done: CompressionRun) -> None:
        _write_report(report_now(done), run, draw=False)

    compression = CompressionRun(settings, run, prepared.adapter, measurement, trainers, progress, show)
    blocks = compression.stages(load_batches(settings, prepared.device))
    report = report_now(compression)
    with progress.stage("save", 1), prepared.adapter.with_blocks(blocks) as model:
        if not run.has("model"):
            if is_first():
                save_compressed(model, prepared.processor, run.path("model"), card=model_card(report))
            run.record("model")
        pictures = _write_report(report, run)
        if is_first():
            log_report(logger.experiment, report, pictures)
        logger.finalize("success")
    return report


def _write_report(report: CompressionReport, run: RunDirectory, *, draw: bool = True) -> Mapping[str, Figure]:
    """The files of the report, written by the first process and recorded; returns the pictures."""
    details = read_details(run)
    names, pictures = write_report(report, run.root, details, draw=draw) if is_first() else ([], {})
    for name in said_by_first(names):
        run.record(name)
    return pictures


def plan(settings: RunSettings) -> int:
    """Print bits, sizes, memory and time of a fit; writes nothing."""
    prepared = prepare(settings)
    chosen = settings.bits.make_plan(prepared.adapter, settings.low_rank.choose(prepared.adapter, None), None)
    estimate = planned_estimate(settings, prepared)
    console = make_console()
    counts: dict[tuple[str, str, str], int] = {}
    for module in chosen.modules:
        rank = "-" if module.rank is None else str(module.rank)
        key = (module.name.rsplit(".", 1)[-1], f"{module.bits}", rank)
        counts[key] = counts.get(key, 0) + 1
    rows = [[linear, bits, rank, str(count)] for (linear, bits, rank), count in counts.items()]
    print_table(["linear", "bits", "rank", "blocks"], rows, console)
    model = prepared.adapter.model
    dense = 2 * sum(parameter.numel() for parameter in model.parameters())
    after = dense - 2 * chosen.weights + chosen.bits_per_weight_total * chosen.weights / 8
    codes, total = chosen.bits_per_weight_codes, chosen.bits_per_weight_total
    lines = [
        f"bits per weight: {codes:.3f} codes, {total:.3f} everything counted",
        f"size: about {size(int(after))} (16-bit original {size(dense)})",
        f"memory: about {size(estimate.memory_bytes)}, {size(psutil.virtual_memory().available)} are free",
        f"time: about {estimate.total_seconds / 60:.0f} minutes: "
        + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in estimate.seconds.items()),
        "Which blocks get more bits is decided after calibration; here the first and last stand in.",
    ]
    for line in lines:
        console.print(line, soft_wrap=True)
    return 0


def validate(settings: RunSettings) -> int:
    """Original and compressed side by side on the recipe's test questions."""
    return _side_by_side(settings, "validate.json")


def test(settings: RunSettings) -> int:
    """Original and compressed side by side on the whole test set; figures in test.json."""
    settings.evaluation.questions = None
    return _side_by_side(settings, "test.json")


def predict(settings: RunSettings, *, image: Path, question: str) -> int:
    """Print the answers of both models to one question."""
    directory = _model_directory(settings)
    prepared = prepare(settings)
    compressed, processor = load_compressed(directory, device=prepared.device)
    for name, model in (("original", prepared.adapter.model), ("compressed", compressed)):
        print(f"{name}: {answer(model, processor, image, question)}")
    return 0


def verify(directory: Path) -> int:
    """Print what is wrong with a run or model directory; exit code 6 if anything is."""
    problems = find_problems(directory)
    for problem in problems:
        print(problem)
    print(f"{directory}: {'whole' if not problems else f'{len(problems)} problems'}")
    return 6 if problems else 0


def report(directory: Path) -> int:
    """Make report.html, report.md and the pictures of a run again from what it left; prints where."""
    print(f"report: {render_again(directory)}")
    return 0


def export(directory: Path, out: Path, format: str, *, dtype: str | None = None) -> int:
    """Write a compressed model in another tool's layout."""
    inner = directory / "model"
    export_model(inner if inner.is_dir() else directory, out, format, dtype=dtype)
    print(f"{out}: {format}, {size(sum(path.stat().st_size for path in out.glob('*.safetensors')))} of weights")
    return 0


def _side_by_side(settings: RunSettings, file: str) -> int:
    directory = _model_directory(settings)
    launch(settings.trainer)
    prepared = prepare(settings)
    stages = {"evaluate original": 1.0, "evaluate compressed": 1.0}
    with RunProgress(stages, enabled=is_first(), verbose=settings.verbose) as progress:
        model, processor = prepared.adapter.model, prepared.processor
        original, outputs = _evaluate("original", model, processor, settings, None, progress)
        compressed, processor = load_compressed(directory, device=prepared.device)
        settings.evaluation.attach(processor)
        tuned, _ = _evaluate("compressed", compressed, processor, settings, outputs, progress)
    adapter = adapt(compressed)
    codes, total = bits_per_weight(adapter, list(adapter.blocks))
    rows = [
        StageRow(name="original", bits_per_weight_codes=16.0, bits_per_weight_total=16.0, **original.to_dict()),
        StageRow(name="end_to_end", bits_per_weight_codes=codes, bits_per_weight_total=total, **tuned.to_dict()),
    ]
    if is_first():
        print_stages(rows, make_console())
        write_text(settings.run_dir / file, json.dumps([vars(row) for row in rows], indent=2) + "\n")
    return 0


def _evaluate(
    name: str, model: Any, processor: Any, settings: RunSettings, reference: Any, progress: RunProgress
) -> tuple[StageFigures, Any]:
    module = EvaluationModule(model, processor, reference=reference)
    trainer = TrainerFactory(settings.trainer, None).make(callbacks=[Advance(progress.advance, loop="test")])
    with progress.stage(f"evaluate {name}", sum(map(len, settings.evaluation.test_dataloader()))):
        trainer.test(module, datamodule=settings.evaluation, verbose=False)
    if module.figures is None:
        raise InputError("evaluation: there is nothing to evaluate; set evaluation.questions or text_tokens.")
    return module.figures, module.outputs


def _model_directory(settings: RunSettings) -> Path:
    directory = settings.run_dir / "model"
    if not directory.is_dir():
        raise InputError(f"{directory} does not exist: run `fit` with this recipe first, or give --run_dir.")
    return directory


def _check_memory(needed_each: int, settings: RunSettings, override: bool) -> None:
    needed = needed_each * process_count() // int(settings.trainer.get("num_nodes") or 1)  # on one machine
    free = psutil.virtual_memory().available
    if needed > free and not override:
        raise ResourceError(
            f"The plan needs about {size(needed)} of memory, {size(free)} are free.\n"
            "Lower data.samples, or start anyway with --override_memory."
        )
