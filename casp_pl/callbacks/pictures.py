"""The pictures of a report, drawn without a display and without pyplot's global state."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from casp_pl.callbacks.example_picture import draw_examples
from casp_pl.callbacks.report import BlockFigures, CompressionReport, ModuleFigures, StageRow

__all__ = ["draw_bits", "draw_pictures", "draw_proxy_loss", "draw_sparsity", "draw_stages", "png_bytes"]

_COLOURS = ("#4d4d4d", "#c44e52", "#8fb0d9", "#5584bf", "#1f4e8c")


def draw_pictures(report: CompressionReport) -> dict[str, Figure]:
    """Every picture that the report has figures for: stages, bits, proxy_loss, attention_sparsity, examples."""
    pictures: dict[str, Figure | None] = {
        "stages": draw_stages(report.stages),
        "bits": draw_bits(report.modules, report.blocks),
        "proxy_loss": draw_proxy_loss(report.modules),
        "attention_sparsity": draw_sparsity(report.blocks),
        "examples": draw_examples(report.examples),
    }
    return {name: figure for name, figure in pictures.items() if figure is not None}


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def draw_stages(stages: Sequence[StageRow]) -> Figure | None:
    """Accuracy with its interval, perplexity and KL, one bar per stage; None without stages."""
    if not stages:
        return None
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    _bars(panels[0], stages, lambda row: _times(row.vqa_accuracy, 100), "answers right, % (95 % interval)", "{:.1f}")
    _intervals(panels[0], stages)
    _bars(panels[1], stages, lambda row: row.perplexity, "perplexity, held-out text", "{:,.1f}")
    _bars(panels[2], stages, lambda row: row.kl, "KL from the original, held-out text, nats", "{:.3f}")
    return figure


def draw_bits(modules: Sequence[ModuleFigures], blocks: Sequence[BlockFigures]) -> Figure | None:
    """Bits of every linear, ranks of the low-rank ones and the scores behind them, by block; None without modules."""
    if not modules:
        return None
    figure = Figure(figsize=(12, 7), layout="constrained")
    grid, ranks, scores = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    bits, linears, numbers = _table(modules, lambda module: module.bits)
    image = grid.pcolormesh(numbers, range(len(linears)), bits, cmap="viridis", edgecolors="white", linewidth=0.5)
    _heat_axes(grid, linears, "bits of the codes")
    levels = sorted({float(value) for value in bits[np.isfinite(bits)]})
    figure.colorbar(image, ax=grid, ticks=levels or None, label="bits")
    for linear in [name for name in linears if any(m.rank is not None for m in modules if m.linear == name)]:
        chosen = [module for module in modules if module.linear == linear and module.rank is not None]
        ranks.plot([m.block for m in chosen], [m.rank for m in chosen], marker="o", markersize=3, label=linear)
    _line_axes(ranks, "rank of the low-rank product")
    scored = [block for block in blocks if block.score is not None]
    scores.plot([b.block for b in scored], [b.score for b in scored], marker="o", markersize=3, color=_COLOURS[-1])
    _line_axes(scores, "score of the block")
    scores.set_xlabel("block")
    return figure


def draw_proxy_loss(modules: Sequence[ModuleFigures]) -> Figure | None:
    """Heat map of the relative proxy loss, linear x block, on a logarithmic scale; None if no loss is known."""
    losses, linears, numbers = _table(modules, lambda module: module.relative_proxy_loss or None)
    known = losses[np.isfinite(losses)]
    if known.size == 0:
        return None
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots()
    low, high = float(known.min()), float(known.max())
    norm = LogNorm(vmin=low, vmax=high if high > low else low * 10)
    image = axes.pcolormesh(
        numbers, range(len(linears)), losses, norm=norm, cmap="magma_r", edgecolors="white", linewidth=0.5
    )
    _heat_axes(axes, linears, "relative proxy loss right after quantization")
    axes.set_xlabel("block")
    figure.colorbar(image, ax=axes)
    return figure


def draw_sparsity(blocks: Sequence[BlockFigures]) -> Figure | None:
    """Attention sparsity per block, one line for each pair of query and key modality; None if it was not measured."""
    kinds = sorted({kind for block in blocks for kind in block.attention_sparsity})
    if not kinds:
        return None
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes = figure.subplots()
    for kind in kinds:
        points = [(block.block, block.attention_sparsity.get(kind)) for block in blocks]
        known = [(number, 100 * share) for number, share in points if share is not None]
        axes.plot([x for x, _ in known], [y for _, y in known], marker="o", markersize=3, label=kind)
    _line_axes(axes, "attention probabilities below the threshold, %")
    axes.set_xlabel("block")
    return figure


def _bars(
    axes: Any, stages: Sequence[StageRow], pick: Callable[[StageRow], float | None], title: str, form: str
) -> None:
    picked = [pick(row) for row in stages]
    values = [value if value is not None and math.isfinite(value) else None for value in picked]
    known = [value for value in values if value is not None]
    colours = [_COLOURS[number % len(_COLOURS)] for number in range(len(stages))]
    axes.bar(range(len(stages)), [0.0 if value is None else value for value in values], color=colours, width=0.7)
    if known and min(known) > 0 and max(known) > 20 * min(known):
        axes.set_yscale("log")
    for position, value in enumerate(values):
        place = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        if value is None:
            axes.annotate("n/a", (position, 0), xycoords=axes.get_xaxis_transform(), **place)
        else:
            axes.annotate(form.format(value), (position, value), **place)
    axes.margins(y=0.15)
    axes.set_xticks(range(len(stages)), [row.name.replace("_", "\n") for row in stages], fontsize=8)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _intervals(axes: Any, stages: Sequence[StageRow]) -> None:
    for position, row in enumerate(stages):
        if row.vqa_interval is not None:
            low, high = (100 * edge for edge in row.vqa_interval)
            axes.vlines(position - 0.25, low, high, color="black", linewidth=1.2)


def _table(
    modules: Sequence[ModuleFigures], pick: Callable[[ModuleFigures], float | None]
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], list[str], list[int]]:
    linears = list(dict.fromkeys(module.linear for module in modules))
    numbers = sorted({module.block for module in modules})
    table = np.full((len(linears), len(numbers)), np.nan)
    for module in modules:
        value = pick(module)
        if value is not None:
            table[linears.index(module.linear), numbers.index(module.block)] = value
    return table, linears, numbers


def _heat_axes(axes: Any, linears: Sequence[str], title: str) -> None:
    axes.set_yticks(range(len(linears)), linears, fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(title, fontsize=10, loc="left")


def _line_axes(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)
    elif not axes.lines:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color="#777777")


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
