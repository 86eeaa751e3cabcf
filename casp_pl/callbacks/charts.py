"""Charts as plain values: what is shown, not how. `pictures` draws them with matplotlib, `svg` for report.html."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Bars", "Chart", "Heat", "Lines", "Picture", "Point", "Series"]

Point = tuple[float, float]

_FEW = 5
_MOST_NAMES = 6


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart.

    Attributes:
        name: for the key.
        points: (x, y), x ascending.
        marks: points that stand out, such as the rank that was chosen.
    """

    name: str
    points: tuple[Point, ...]
    marks: tuple[Point, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Lines over one axis.

    Attributes:
        title: what y is, with its unit.
        x: what x is.
        series: the lines.
        log: whether y is logarithmic; values that are not positive are left out then.
        ordered: whether the series are steps of one quantity (blocks, front to back): a ramp, not different colours.
        marks: what marked points are; empty without marks.
    """

    title: str
    x: str
    series: tuple[Series, ...]
    log: bool = False
    ordered: bool = False
    marks: str = ""

    @property
    def named(self) -> list[int]:
        """Numbers of the series that a key names: all, but of many ordered ones the first, the middle and the last."""
        count = len(self.series)
        return sorted({0, count // 2, count - 1}) if self.ordered and count > _MOST_NAMES else list(range(count))


@dataclass(frozen=True, kw_only=True)
class Heat:
    """A table of values shown by colour.

    Attributes:
        title: what the values are, with their unit.
        rows: names of the rows.
        columns: numbers of the columns.
        values: value of each row and column; None where there is none.
        x: what a column is.
        form: format of a value.
        log: whether the scale is logarithmic.
        bounds: values at the ends of the scale; None takes the smallest and the largest.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]
    x: str = "block"
    form: str = "{:.3g}"
    log: bool = False
    bounds: tuple[float, float] | None = None

    @property
    def known(self) -> list[float]:
        """All values that there are."""
        return [value for row in self.values for value in row if value is not None]

    @property
    def levels(self) -> list[float]:
        """All different values where they are few, such as bits; else nothing."""
        found = sorted(set(self.known))
        return found if len(found) <= _FEW else []

    @property
    def scale(self) -> tuple[float, float]:
        """Values at the ends of the scale, the first smaller than the second."""
        low, high = self.bounds or (min(self.known), max(self.known))
        return (low, high) if high > low else (low, low * 10 if self.log else low + 1)


@dataclass(frozen=True, kw_only=True)
class Bars:
    """One bar a name.

    Attributes:
        title: what the lengths are, with their unit.
        names: of the bars.
        values: their lengths; None where it was not measured.
        intervals: ends of each value's interval; None where there is none; empty for no intervals.
        form: format of a value.
        fair: whether lengths are to be compared, so that the scale stays linear however much they differ.
    """

    title: str
    names: tuple[str, ...]
    values: tuple[float | None, ...]
    intervals: tuple[tuple[float, float] | None, ...] = ()
    form: str = "{:,.3g}"
    fair: bool = False

    @property
    def log(self) -> bool:
        """Whether the scale is logarithmic: small values would not be seen otherwise."""
        known = [value for value in self.values if value is not None]
        return not self.fair and bool(known) and min(known) > 0 and max(known) > 20 * min(known)


Chart = Lines | Heat | Bars


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Charts that belong together.

    Attributes:
        name: for file names and links.
        title: heading.
        text: how to read it, in a sentence or two.
        charts: the charts, side by side where there is room.
    """

    name: str
    title: str
    text: str
    charts: Sequence[Chart]

    @property
    def most_in_a_row(self) -> int:
        """How many charts may stand side by side: three, but four charts are two and two."""
        return 2 if len(self.charts) == 4 else min(len(self.charts), 3)
