"""The report of a run, put together from its artifacts, and its examples."""

from pathlib import Path

from casp_pl.allocation import CompressionPlan
from casp_pl.callbacks.environment import machine_parts, package_versions, peak_memory_bytes, source_commit
from casp_pl.callbacks.report import (
    BlockFigures,
    CompressionReport,
    Example,
    ModuleFigures,
    StageRow,
    sparsity_by_modality,
)
from casp_pl.callbacks.report_files import read_report, write_report
from casp_pl.callbacks.run_details import read_details
from casp_pl.checkpoint import RunDirectory
from casp_pl.data.evaluation import EvaluationData
from casp_pl.errors import InputError
from casp_pl.models.compress import LinearReport
from casp_pl.modules import CalibrationStatistics
from casp_pl.pipeline.examples import choose_examples
from casp_pl.pipeline.measure import Measurement
from casp_pl.pipeline.settings import RunSettings

__all__ = ["build_report", "render_again"]


def build_report(
    settings: RunSettings,
    run: RunDirectory,
    rows: list[StageRow],
    linears: list[LinearReport],
    measurement: Measurement,
    seconds: float,
    work_seconds: dict[str, float],
    backends: dict[str, str],
) -> CompressionReport:
    """Everything a run has to say by now; what has not been measured yet is left empty.

    Args:
        settings: the recipe.
        run: its directory.
        rows: figures by stage.
        linears: one report for each linear that is done.
        measurement: knows the answers of each stage.
        seconds: wall time of the run so far, interrupted parts included.
        work_seconds: see `CompressionRun.work_seconds`.
        backends: see `CompressionRun.backends`.
    """
    plan = CompressionPlan.from_json(run.read_json("plan.json")) if run.has("plan.json") else None
    return CompressionReport(
        name=settings.name,
        model=settings.model.label if plan is None else f"{settings.model.label} ({plan.model})",
        quantizer=settings.quantizer.name,
        commit=source_commit(),
        versions=package_versions(),
        wall_seconds=seconds,
        work_seconds=work_seconds,
        peak_memory_bytes=peak_memory_bytes(),
        stages=tuple(rows),
        modules=() if plan is None else _modules(plan, linears),
        blocks=() if plan is None else _blocks(plan, run),
        data={"calibration": settings.data.counts, "evaluation": settings.evaluation.counts},
        examples=_examples(settings.evaluation, measurement, rows[-1].name),
        command=settings.command or None,
        machine=machine_parts() | backends,
        planned_stages=settings.planned_stages,
    )


def render_again(directory: Path) -> Path:
    """Makes the report of a run again from what it left, without computing anything; returns the page.

    Raises:
        InputError: no stage of the run has been measured yet.
        ResourceError: the run is going on.
        IntegrityError: a file is not what was written.
    """
    with RunDirectory.open(directory, RunDirectory.read_only(directory).fingerprint) as run:
        if not run.has("report.json"):
            raise InputError(f"{directory} has no report.json: `fit` writes it when the first stage is measured.")
        names, _ = write_report(read_report(run.root), run.root, read_details(run))
        for name in names:
            run.record(name)
        return run.path("report.html")


def _modules(plan: CompressionPlan, linears: list[LinearReport]) -> tuple[ModuleFigures, ...]:
    by_name = {report.name: report for report in linears}
    figures = []
    for module in plan.modules:
        done = by_name.get(module.name)
        figures.append(
            ModuleFigures(
                name=module.name,
                block=module.block,
                shape=module.shape,
                rank=module.rank,
                bits=module.bits,
                bits_total=None if done is None else done.bits_total,
                relative_proxy_loss=None if done is None else done.relative_proxy_loss,
                seconds=None if done is None else done.seconds,
                dead_columns=None if done is None else done.dead_columns,
            )
        )
    return tuple(figures)


def _blocks(plan: CompressionPlan, run: RunDirectory) -> tuple[BlockFigures, ...]:
    statistics = CalibrationStatistics.from_tensors(run.read_tensors("calibration.safetensors")[0])
    scores = {block: sum(module.score for module in plan.of_block(block)) for block in plan.blocks}
    return tuple(
        BlockFigures(block=block, score=score, attention_sparsity=sparsity_by_modality(shares))
        for (block, score), shares in zip(scores.items(), statistics.attention_sparsity.tolist(), strict=True)
    )


def _examples(data: EvaluationData, measurement: Measurement, stage: str) -> tuple[Example, ...]:
    if not data.samples:
        return ()
    original, compressed = measurement.outputs("original"), measurement.outputs(stage)
    answers = {
        name: (before, after)
        for name, before, after in zip(original.sample_ids, original.answers, compressed.answers, strict=True)
    }
    return tuple(
        Example(
            question=sample.turns[0].question,
            original=answers[sample.id][0],
            compressed=answers[sample.id][1],
            reference=sample.turns[0].answer,
            image=None if sample.image is None else str(sample.image),
        )
        for sample in choose_examples(data.samples, answers)
    )
