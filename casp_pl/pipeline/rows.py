"""The rows that a fit prints: one for each block, window of blocks and stage."""

from collections.abc import Mapping, Sequence

from casp_pl.allocation import CompressionPlan
from casp_pl.callbacks.report import StageRow
from casp_pl.callbacks.stage_table import duration, number, stage_title
from casp_pl.console import RunProgress
from casp_pl.models.compress import LinearReport

__all__ = ["show_block", "show_stage", "show_window"]


def show_block(progress: RunProgress, block: int, reports: Sequence[LinearReport], plan: CompressionPlan) -> None:
    """Bits a weight of a quantized block, largest relative error of its linears; with verbose each of them."""
    weights = {module.name: module.weights for module in plan.of_block(block)}
    bits = sum(report.bits_total * weights[report.name] for report in reports) / sum(weights.values())
    error = max(report.relative_proxy_loss for report in reports)
    for report in reports:
        name = report.name.rsplit(".", 1)[-1]
        figures = [*_cost(report.bits_total, report.relative_proxy_loss)]
        figures += [f"{report.dead_columns} dead inputs"] if report.dead_columns else []
        progress.detail(f"  {name}", *figures, time=duration(report.seconds))
    seconds = sum(report.seconds for report in reports)
    progress.row(f"block {block:2d}", *_cost(bits, error), time=duration(seconds))


def show_window(
    progress: RunProgress, blocks: range, losses: Mapping[str, float | None], seconds: float | None
) -> None:
    """The held-back error of blocks that were tuned together, before and after; None for seconds of an earlier run."""
    name = f"block {blocks[0]:2d}" if len(blocks) == 1 else f"blocks {blocks[0]:2d}-{blocks[-1]:2d}"
    error = f"error {number(losses['held_back_before'], 4)} -> {number(losses['held_back_after'], 4)}"
    progress.row(name, error, time=duration(seconds))


def show_stage(progress: RunProgress, row: StageRow) -> None:
    """What a stage was measured to be; a figure that is not finite reads n/a."""
    figures = [f"right {number(row.vqa_accuracy, 1, 100):>5} %"] if row.vqa_accuracy is not None else []
    figures += [f"perplexity {number(row.perplexity, 2):>6}"] if row.text_tokens else []
    figures += [f"KL {number(row.kl, 4)}"] if row.text_tokens and row.name != "original" else []
    progress.row(stage_title(row.name), *figures, time=duration(row.seconds))


def _cost(bits: float, error: float) -> tuple[str, str]:
    return f"{bits:5.2f} bits", f"error {error:.4f}"
