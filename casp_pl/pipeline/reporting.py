"""The report of a run, put together from its artifacts, and its examples."""

from casp_pl.allocation import CompressionPlan
from casp_pl.callbacks.environment import package_versions, peak_memory_bytes, source_commit
from casp_pl.callbacks.report import (
    BlockFigures,
    CompressionReport,
    Example,
    ModuleFigures,
    StageRow,
    sparsity_by_modality,
)
from casp_pl.checkpoint import RunDirectory
from casp_pl.data.evaluation import EvaluationData
from casp_pl.models.compress import LinearReport
from casp_pl.modules import CalibrationStatistics
from casp_pl.pipeline.examples import choose_examples
from casp_pl.pipeline.measure import Measurement
from casp_pl.pipeline.settings import RunSettings

__all__ = ["build_report"]


def build_report(
    settings: RunSettings,
    run: RunDirectory,
    rows: list[StageRow],
    linears: list[LinearReport],
    statistics: CalibrationStatistics,
    measurement: Measurement,
    seconds: float,
    work_seconds: dict[str, float],
) -> CompressionReport:
    """Everything a run has to say.

    Args:
        settings: the recipe.
        run: its directory.
        rows: figures by stage.
        linears: one report per linear.
        statistics: of the calibration pass.
        measurement: knows the answers of each stage.
        seconds: wall time of the run so far, interrupted parts included.
        work_seconds: see `CompressionRun.work_seconds`.
    """
    plan = CompressionPlan.from_json(run.read_json("plan.json"))
    by_name = {report.name: report for report in linears}
    modules = tuple(
        ModuleFigures(
            name=module.name,
            block=module.block,
            shape=module.shape,
            rank=module.rank,
            bits=module.bits,
            bits_total=by_name[module.name].bits_total,
            relative_proxy_loss=by_name[module.name].relative_proxy_loss,
            seconds=by_name[module.name].seconds,
        )
        for module in plan.modules
    )
    scores = {block: sum(module.score for module in plan.of_block(block)) for block in plan.blocks}
    blocks = tuple(
        BlockFigures(block=block, score=score, attention_sparsity=sparsity_by_modality(shares))
        for (block, score), shares in zip(scores.items(), statistics.attention_sparsity.tolist(), strict=True)
    )
    return CompressionReport(
        name=settings.name,
        model=f"{settings.model.source} ({plan.model})",
        quantizer=settings.quantizer.name,
        commit=source_commit(),
        versions=package_versions(),
        wall_seconds=seconds,
        work_seconds=work_seconds,
        peak_memory_bytes=peak_memory_bytes(),
        stages=tuple(rows),
        modules=modules,
        blocks=blocks,
        data={"calibration": settings.data.counts, "evaluation": settings.evaluation.counts},
        examples=_examples(settings.evaluation, measurement, rows[-1].name),
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
