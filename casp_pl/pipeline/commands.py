"""What each subcommand does with a parsed recipe. Every function returns the exit code."""

import sys
from collections.abc import Mapping
from json import dumps
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from casp_pl.callbacks.report import CompressionReport
from casp_pl.callbacks.report_files import write_report
from casp_pl.callbacks.run_details import read_details
from casp_pl.callbacks.stage_table import print_stages, size
from casp_pl.callbacks.tensorboard import log_report
from casp_pl.checkpoint import RunDirectory, save_compressed, save_streamed, write_text
from casp_pl.checkpoint import verify as find_problems
from casp_pl.checkpoint.stored_names import half_of
from casp_pl.console import RunProgress, make_console, print_path, print_text
from casp_pl.data.tokenize import takes_images
from casp_pl.errors import ConfigError, ResourceError
from casp_pl.export import export_model
from casp_pl.models.memory import Memory
from casp_pl.pipeline.block_files import BlockFiles
from casp_pl.pipeline.chat import open_conversations, read_questions
from casp_pl.pipeline.divided import check_divided
from casp_pl.pipeline.estimate import planned_estimate
from casp_pl.pipeline.explain import ExplainSettings, explanation
from casp_pl.pipeline.forecast import forecast_run
from casp_pl.pipeline.launch import launched
from casp_pl.pipeline.measure import Measurement
from casp_pl.pipeline.model_card import model_card
from casp_pl.pipeline.plan_text import print_forecast
from casp_pl.pipeline.prepare import Prepared, fingerprint, load_batches, load_original, prepare_outline
from casp_pl.pipeline.reporting import build_report, render_again
from casp_pl.pipeline.run import CompressionRun
from casp_pl.pipeline.settings import RunSettings
from casp_pl.pipeline.side_by_side import side_by_side
from casp_pl.pipeline.stage_forecast import way_out
from casp_pl.pipeline.trainers import TrainerFactory
from casp_pl.processes import is_first, said_by_first

__all__ = ["explain", "export", "fit", "plan", "predict", "report", "test", "validate", "verify"]


def fit(settings: RunSettings, *, override_memory: bool = False) -> int:
    """Compress, fine-tune, evaluate and save; goes on where an earlier run of the same recipe stopped."""
    RunDirectory.check_place(settings.run_dir)
    check_divided(settings)
    with launched(settings.trainer):
        return _fit_together(settings, override_memory=override_memory)


def _fit_together(settings: RunSettings, *, override_memory: bool) -> int:
    outline = prepare_outline(settings)
    check_divided(settings, streams=outline.streamed)
    estimate = planned_estimate(settings, outline)
    if outline.free is not None and not override_memory:
        _check_memory(estimate.memory, outline.free)
    prepared = load_original(settings, outline, digest=True)
    with RunDirectory.open(settings.run_dir, fingerprint(settings, prepared)) as run:
        if is_first():
            write_text(run.path("config.yaml"), settings.recipe)
        with RunProgress(estimate.seconds, enabled=is_first(), verbose=settings.verbose) as progress:
            report = _fit(settings, prepared, run, progress)
    if is_first():
        console = make_console()
        print_stages(report.stages, console)
        print_path("model: ", run.path("model"), console)
        print_path("report:", run.path("report.html"), console)
    return 0


def _fit(settings: RunSettings, prepared: Prepared, run: RunDirectory, progress: RunProgress) -> CompressionReport:
    logger = TensorBoardLogger(str(settings.run_dir), name="tensorboard", version="")
    trainers = TrainerFactory(settings.trainer, logger, weights=settings.model.dtype)
    measurement = Measurement(run, settings.evaluation, prepared.processor, settings.scoring, trainers)

    def report_now(done: CompressionRun) -> CompressionReport:
        times = done.seconds, done.work_seconds()
        return build_report(settings, run, done.rows(), done.linears, measurement, *times, done.backends)

    def show(done: CompressionRun) -> None:
        _write_report(report_now(done), run, draw=False)

    compression = CompressionRun(settings, run, prepared.adapter, measurement, trainers, progress, show)
    blocks = compression.stages(load_batches(settings, prepared.device))
    report = report_now(compression)
    with progress.stage("save", 1):
        if not run.has("model"):
            run.discard("model")  # what lies there was changed, perhaps so that it is no model any more
            if is_first():
                card = model_card(report, settings, takes_images=takes_images(prepared.processor))
                _save(prepared, blocks, run.path("model"), card)
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


def _save(prepared: Prepared, blocks: BlockFiles, directory: Path, card: str) -> None:
    adapter, half = prepared.adapter, half_of(prepared.headers)
    if adapter.stored is not None:
        save_streamed(adapter, blocks, prepared.processor, directory, card=card, half=half)
        return
    with adapter.with_blocks(blocks) as model:
        save_compressed(model, prepared.processor, directory, card=card, half=half)


def plan(settings: RunSettings, *, json: bool = False, quick: bool = False) -> int:
    """Print what a fit will take and give, as tables or as JSON; writes nothing."""
    check_divided(settings)
    forecast = forecast_run(settings, quick=quick)
    if json:
        print(dumps(forecast.to_json(), indent=1))
    else:
        print_forecast(forecast, make_console())
    return 0


def explain(recipe: ExplainSettings, module: str) -> int:
    """Print why a linear of a run got its rank and bits."""
    print_text("\n".join(explanation(recipe, module)), make_console())
    return 0


def validate(settings: RunSettings) -> int:
    """Original and compressed side by side on the recipe's test questions; figures in validate.json and validate.md."""
    return side_by_side(settings, "validate")


def test(settings: RunSettings) -> int:
    """Original and compressed side by side on the whole test set; figures in test.json and test.md."""
    settings.evaluation.questions = None
    return side_by_side(settings, "test")


def predict(settings: RunSettings, *, question: str | None, chat: bool, **who: Any) -> int:
    """Answer one question, or every line of standard input in one conversation; `who` goes to `open_conversations`."""
    if chat == (question is not None):
        raise ConfigError("predict needs either --question or --chat, which reads one question a line.")
    talks = open_conversations(settings, **who)
    out = make_console().file  # takes any character that a model may answer
    for asked in read_questions(sys.stdin, out) if question is None else [question]:
        for talk in talks:
            talk.ask(asked, out)
    return 0


def verify(directory: Path) -> int:
    """Print what is wrong with a run or model directory; exit code 6 if anything is."""
    problems = find_problems(directory)
    result = f"{len(problems)} problems" if problems else "whole"
    print_text("\n".join([*problems, f"{directory}: {result}"]), make_console())
    return 6 if problems else 0


def report(directory: Path) -> int:
    """Make report.html, report.md and the pictures of a run again from what it left; prints where."""
    print_path("report:", render_again(directory), make_console())
    return 0


def export(directory: Path, out: Path, format: str, *, dtype: str | None = None) -> int:
    """Write a compressed model in another tool's layout."""
    inner = directory / "model"
    export_model(inner if inner.is_dir() else directory, out, format, dtype=dtype)
    weights = size(sum(path.stat().st_size for path in out.glob("*.safetensors")))
    print_text(f"{out}: {format}, {weights} of weights", make_console())
    return 0


def _check_memory(needed: Mapping[str, Memory], free: Memory) -> None:
    """Refuses before a weight is loaded; afterwards a machine that is too small would kill the process."""
    for part, place in (("device", "memory"), ("host", "the host's memory")):
        stage = max(needed, key=lambda name: getattr(needed[name], part))
        wanted, there = getattr(needed[stage], part), getattr(free, part)
        if wanted > there:
            raise ResourceError(
                f"The plan needs about {size(wanted)} of {place} a process ({stage}), {size(there)} are free.\n"
                f"To need less: {way_out(stage)} Or start anyway with --override_memory."
            )
