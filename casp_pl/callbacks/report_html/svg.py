"""Charts as small SVG elements: sized by the page, coloured by its style sheet, described for screen readers.

Everything is laid out on a canvas 320 wide, about the width of a phone, so that text is as large there as it is here.
"""

from collections.abc import Sequence

from markupsafe import Markup

from casp_pl.callbacks.charts import Bars, Chart, Heat, Lines, Point
from casp_pl.callbacks.report_html.elements import log_ticks, number_text, path, scale, tag, text, ticks

__all__ = ["HEAT_COLOURS", "LINE_COLOURS", "draw_svg", "line_class"]

HEAT_COLOURS = 24
"""Steps of the scale of a `Heat`: CSS classes h0 .. h23."""

LINE_COLOURS = 12
"""Steps of the ramp of ordered `Lines`: CSS classes r0 .. r11."""

_WIDTH = 320.0
_RIGHT = 8.0  # margin
_MOST_TIPS = 700  # values of a table that each have their own tip: more would make the page heavy
_MOST_DOTS = 40  # points of a line that are shown one by one


def draw_svg(chart: Chart) -> Markup:
    """The chart as one <svg> element."""
    if isinstance(chart, Bars):
        return _bars(chart)
    return _heat(chart) if isinstance(chart, Heat) else _lines(chart)


def line_class(number: int, count: int, ordered: bool) -> str:
    """CSS class of one of `count` lines: its step of the ramp where they are ordered, else its colour and dashes."""
    return f"r{round(number * (LINE_COLOURS - 1) / max(count - 1, 1))}" if ordered else f"s{number % 4}"


def _svg(height: float, label: str, parts: Sequence[Markup]) -> Markup:
    return tag("svg", *parts, role="img", aria_label=label, viewBox=f"0 0 {_WIDTH:.0f} {height:.0f}")


def _bars(chart: Bars) -> Markup:
    left, row, room = 84.0, 30.0, 66.0
    known = [value for value in chart.values if value is not None]
    ends = [edge for pair in chart.intervals if pair is not None for edge in pair]
    low, high = (min(known) / 2 if chart.log else 0.0), max([*known, *ends, 1e-12])
    place = scale(low, high, left, _WIDTH - room, log=chart.log)
    intervals = chart.intervals or (None,) * len(chart.names)
    parts = [path([(left, 2), (left, row * len(chart.names))], "axis")]
    for number, (name, value, pair) in enumerate(zip(chart.names, chart.values, intervals, strict=True)):
        top = row * number
        parts.append(text(left - 6, top + 19, name, "end"))
        if value is None:
            parts.append(text(left + 6, top + 19, "not measured", "dim"))
            continue
        edge = place(value)
        parts.append(tag("rect", class_="bar", x=left, y=top + 6, width=max(edge - left, 1.0), height=16.0))
        if pair is not None:
            first, last = map(place, pair)
            parts.append(path([(first, top + 14), (last, top + 14)], "whisker"))
            parts += [path([(x, top + 10), (x, top + 18)], "whisker") for x in (first, last)]
            edge = max(edge, last)
        parts.append(text(edge + 6, top + 19, chart.form.format(value)))
    shown = ["not measured" if value is None else chart.form.format(value) for value in chart.values]
    label = ", ".join(f"{name} {value}" for name, value in zip(chart.names, shown, strict=True))
    return _svg(row * len(chart.names) + 2, f"Bars, {chart.title}: {label}", parts)


def _heat(chart: Heat) -> Markup:
    left = 12.0 + 6.4 * max(map(len, chart.rows))
    row, size = (20.0, "end") if len(chart.rows) <= 10 else (14.0, "end small")
    column = (_WIDTH - left - _RIGHT) / len(chart.columns)
    place = scale(*chart.scale, 0, HEAT_COLOURS - 1, log=chart.log)
    tips = len(chart.rows) * len(chart.columns) <= _MOST_TIPS
    parts = []
    for r, (name, values) in enumerate(zip(chart.rows, chart.values, strict=True)):
        parts.append(text(left - 6, r * row + row / 2 + 4, name, size))
        for c, value in enumerate(values):
            if value is not None:
                told = f"{name}, {chart.x} {chart.columns[c]}: {chart.form.format(value)}"
                tip = [tag("title", told)] if tips else []
                shape = {"x": left + c * column, "y": r * row, "width": column - min(1, column / 8), "height": row - 1}
                parts.append(tag("rect", *tip, class_=f"h{round(place(value))}", **shape))
    bottom = row * len(chart.rows)
    for c in range(0, len(chart.columns), -(-len(chart.columns) // 8)):
        parts.append(text(left + (c + 0.5) * column, bottom + 14, str(chart.columns[c]), "mid small"))
    parts.append(text(left - 6, bottom + 14, chart.x, "end small dim"))
    parts += _key(chart, left, bottom + 24)
    low, high = (chart.form.format(edge(chart.known)) for edge in (min, max))
    count = f"{len(chart.rows)} rows by {len(chart.columns)} {chart.x}s"
    return _svg(bottom + 50, f"Table of colours, {chart.title}: {count}, from {low} to {high}", parts)


def _key(chart: Heat, left: float, top: float) -> list[Markup]:
    """Each value where there are few, else the scale from low to high."""
    low, high = chart.scale
    if chart.levels:
        return _levels(chart, left, top)
    width = (_WIDTH - left - _RIGHT) / HEAT_COLOURS
    steps = ((f"h{number}", left + number * width) for number in range(HEAT_COLOURS))
    parts = [tag("rect", class_=css, x=x, y=top, width=width + 0.3, height=8.0) for css, x in steps]
    parts.append(text(left, top + 21, chart.form.format(low), "small"))
    parts.append(text(_WIDTH - _RIGHT, top + 21, chart.form.format(high), "end small"))
    if chart.log:
        parts.append(text((left + _WIDTH - _RIGHT) / 2, top + 21, "log scale", "mid small dim"))
    return parts


def _levels(chart: Heat, left: float, top: float) -> list[Markup]:
    place = scale(*chart.scale, 0, HEAT_COLOURS - 1, log=chart.log)
    width = (_WIDTH - left - _RIGHT) / len(chart.levels)
    parts = []
    for number, value in enumerate(chart.levels):
        x = left + number * width
        parts.append(tag("rect", class_=f"h{round(place(value))}", x=x, y=top, width=12.0, height=12.0))
        parts.append(text(x + 17, top + 10, chart.form.format(value), "small"))
    return parts


def _lines(chart: Lines) -> Markup:
    left, right, bottom, height = 46.0, _WIDTH - _RIGHT, 186.0, 222.0
    shown = [[point for point in line.points if not chart.log or point[1] > 0] for line in chart.series]
    xs, ys = ([point[axis] for points in shown for point in points] for axis in (0, 1))
    y_ticks = log_ticks(min(ys), max(ys)) if chart.log else ticks(min(ys), max(ys))
    edges = ys if chart.log else [*ys, *y_ticks]
    x = scale(min(xs), max(xs), left + 4, right - 4)
    y = scale(min(edges), max(edges), bottom - 4, 10, log=chart.log)
    parts = []
    for tick in y_ticks:
        parts.append(path([(left, y(tick)), (right, y(tick))], "grid"))
        parts.append(text(left - 6, y(tick) + 4, number_text(tick), "end small"))
    parts += [text(x(t), bottom + 16, number_text(t), "mid small") for t in ticks(min(xs), max(xs), whole=True)]
    parts += [path([(left, bottom), (right, bottom)], "axis"), text(right, height - 4, chart.x, "end small dim")]
    for number, (line, points) in enumerate(zip(chart.series, shown, strict=True)):
        marks = [tag("path", class_="mark", d=f"M{x(a):.1f} {y(b) - 5:.1f}l5 5l-5 5l-5 -5z") for a, b in line.marks]
        drawn = [tag("title", line.name), *_line([(x(a), y(b)) for a, b in points]), *marks]
        parts.append(tag("g", *drawn, class_=line_class(number, len(shown), chart.ordered)))
    return _svg(height, _description(chart, shown), parts)


def _line(places: Sequence[Point]) -> list[Markup]:
    dots = places if len(places) <= _MOST_DOTS else ()
    return [path(places, "line"), *(tag("circle", cx=x, cy=y, r=2.0) for x, y in dots)]


def _description(chart: Lines, shown: Sequence[Sequence[Point]]) -> str:
    """What a screen reader says: where each line starts and ends, the first and the last of many."""
    named = [(line.name, points) for line, points in zip(chart.series, shown, strict=True) if points]
    chosen = named if len(named) <= 4 else [named[0], named[-1]]
    each = [f"{name} from {_told(chart, points[0])} to {_told(chart, points[-1])}" for name, points in chosen]
    return f"{len(named)} lines, {chart.title}: {'; '.join(each)}"


def _told(chart: Lines, point: Point) -> str:
    return f"{number_text(point[1])} at {chart.x} {number_text(point[0])}"
