"""What charts in SVG are made of: escaped elements, scales, ticks, numbers as text."""

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup
from matplotlib.ticker import LogLocator, MaxNLocator

__all__ = ["Scale", "log_ticks", "number_text", "path", "scale", "tag", "text", "ticks"]

Scale = Callable[[float], float]
"""Value -> place on the canvas."""


def tag(name: str, *children: str, **attributes: str | float) -> Markup:
    """An element; attributes and children are escaped unless they are Markup. `class_` is class."""
    named = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    pairs = (Markup(' {}="{}"').format(key, v if isinstance(v, str) else _coordinate(v)) for key, v in named)
    inside = Markup("").join(children)
    head = Markup("<{}{}").format(name, Markup("").join(pairs))
    return Markup("{}>{}</{}>").format(head, inside, name) if children else Markup("{}/>").format(head)


def text(x: float, y: float, words: str, css: str = "") -> Markup:
    """A line of text whose base line is at y."""
    return tag("text", words, x=x, y=y, **({"class_": css} if css else {}))


def path(points: Sequence[tuple[float, float]], css: str) -> Markup:
    """Straight lines from point to point."""
    return tag("path", class_=css, d="M" + "L".join(f"{_coordinate(x)} {_coordinate(y)}" for x, y in points))


def scale(low: float, high: float, start: float, end: float, *, log: bool = False) -> Scale:
    """Values from `low` to `high` between `start` and `end`; in the middle where all values are one."""
    if log:
        inner = scale(math.log10(low), math.log10(high), start, end)
        return lambda value: inner(math.log10(max(value, low)))
    if high <= low:
        return lambda _: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers that enclose the range, or lie in it where they must be `whole`; one where all is one value."""
    if high <= low:
        return [low]
    found = [float(tick) for tick in MaxNLocator(nbins=5, integer=whole).tick_values(low, high)]
    return [tick for tick in found if low <= tick <= high] if whole else found


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in the range, or 1, 2 and 5 of each where there are few."""
    subs = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)
    found = [float(tick) for tick in LogLocator(base=10, subs=subs, numticks=8).tick_values(low, high)]
    return [tick for tick in found if 0.999 * low <= tick <= 1.001 * high] or [low, high]


def number_text(value: float) -> str:
    """At most four digits, or a power of ten."""
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _coordinate(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
