"""The pictures of a report for report.md and TensorBoard, drawn without a display and without pyplot's global state."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from casp_pl.callbacks.charts import Bars, Chart, Heat, Lines, Picture
from casp_pl.callbacks.example_picture import draw_examples
from casp_pl.callbacks.palette import DASHES, LIGHT_SERIES, ramp
from casp_pl.callbacks.report import CompressionReport
from casp_pl.callbacks.report_charts import report_pictures
from casp_pl.callbacks.run_details import RunDetails

__all__ = ["draw_picture", "draw_pictures", "png_bytes"]

_WIDTH = 12.0  # inches
_GREY = "#777777"


# OpenBLAS may call finite 3 x 3 matrices invalid, because of lanes that it does not use
_quiet_about_lanes = np.errstate(invalid="ignore")


@_quiet_about_lanes
def draw_pictures(report: CompressionReport, details: RunDetails) -> dict[str, Figure]:
    """Every picture that there are figures for, by name; the example images are the last."""
    figures = {picture.name: draw_picture(picture) for picture in report_pictures(report, details)}
    examples = draw_examples(report.examples)
    return figures if examples is None else figures | {"examples": examples}


@_quiet_about_lanes
def draw_picture(picture: Picture) -> Figure:
    """All charts of a picture, so many in a row as it allows."""
    columns = picture.most_in_a_row
    rows = [picture.charts[start : start + columns] for start in range(0, len(picture.charts), columns)]
    heights = [max(map(_height, row)) for row in rows]
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for axes, chart in zip(grid.flat, picture.charts, strict=False):
        _draw(axes, chart, figure)
    for axes in list(grid.flat)[len(picture.charts) :]:
        axes.set_axis_off()
    return figure


@_quiet_about_lanes
def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _height(chart: Chart) -> float:
    return max(3.6, 1.2 + 0.16 * len(chart.rows)) if isinstance(chart, Heat) else 3.6


def _draw(axes: Any, chart: Chart, figure: Figure) -> None:
    axes.set_title(chart.title, fontsize=10, loc="left", parse_math=False)
    if isinstance(chart, Bars):
        _draw_bars(axes, chart)
    elif isinstance(chart, Heat):
        _draw_heat(axes, chart, figure)
    else:
        _draw_lines(axes, chart)


def _draw_bars(axes: Any, chart: Bars) -> None:
    places = range(len(chart.names))
    axes.barh(places, [value or 0.0 for value in chart.values], color=LIGHT_SERIES[0], height=0.6)
    if chart.log:
        axes.set_xscale("log")
    for place, value in zip(places, chart.values, strict=True):
        where = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        if value is None:
            axes.annotate("n/a", (0, place), xycoords=axes.get_yaxis_transform(), **where)
        else:
            axes.annotate(chart.form.format(value), (value, place), **where)
    for place, ends in zip(places, chart.intervals, strict=False):
        if ends is not None:
            axes.hlines(place - 0.4, *ends, color="black", linewidth=1.2)
    axes.margins(x=0.25)
    axes.set_yticks(places, chart.names, fontsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def _draw_heat(axes: Any, chart: Heat, figure: Figure) -> None:
    values = np.array([[np.nan if v is None else v for v in row] for row in chart.values], dtype=np.float64)
    norm = (LogNorm if chart.log else Normalize)(*chart.scale)
    image = axes.imshow(values, norm=norm, cmap="cividis", aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(chart.rows)), chart.rows, fontsize=8 if len(chart.rows) < 12 else 5)
    shown = _every(chart.columns)
    axes.set_xticks(shown, [str(chart.columns[place]) for place in shown], fontsize=8)
    axes.set_xlabel(chart.x, fontsize=8)
    figure.colorbar(image, ax=axes)


def _every(columns: Sequence[int]) -> list[int]:
    """Places of at most 16 columns that get a number."""
    return list(range(0, len(columns), -(-len(columns) // 16)))


def _draw_lines(axes: Any, chart: Lines) -> None:
    count = len(chart.series)
    colours = ramp(count, 0.0, 0.85) if chart.ordered else [LIGHT_SERIES[n % len(LIGHT_SERIES)] for n in range(count)]
    for number, (line, colour) in enumerate(zip(chart.series, colours, strict=True)):
        dashes = () if chart.ordered else DASHES[number % len(DASHES)]
        style = {"dashes": dashes} if dashes else {}
        dots = {"marker": "o", "markersize": 3} if len(line.points) <= 40 else {}
        label = line.name if number in chart.named else f"_{line.name}"  # an underscore keeps it out of the key
        axes.plot(*zip(*line.points, strict=True), color=colour, linewidth=1.2, label=label, **style, **dots)
        for x, y in line.marks:
            axes.plot([x], [y], marker="D", markersize=4, color=colour, markeredgecolor="black", markeredgewidth=0.5)
    if chart.marks:
        axes.plot([], [], "D", color=_GREY, markersize=4, label=chart.marks)
    if chart.log:
        axes.set_yscale("log")
    axes.set_xlabel(chart.x, fontsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if count > 1 or chart.marks:
        axes.legend(fontsize=8, frameon=False)
