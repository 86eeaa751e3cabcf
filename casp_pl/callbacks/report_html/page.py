"""The page: what its template shows, in words and numbers. The template escapes everything that is not Markup."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from casp_pl.callbacks.charts import Bars, Chart, Lines, Picture
from casp_pl.callbacks.example_images import small_image
from casp_pl.callbacks.palette import DARK_SERIES, DASHES, LIGHT_SERIES, ramp
from casp_pl.callbacks.report import CompressionReport, Example
from casp_pl.callbacks.report_charts import TEXTS, report_pictures
from casp_pl.callbacks.report_html.cards import summary_cards
from casp_pl.callbacks.report_html.svg import HEAT_COLOURS, LINE_COLOURS, draw_svg, line_class
from casp_pl.callbacks.report_markdown import MODULE_HEADER, READING, count_rows, measured_on, module_cells
from casp_pl.callbacks.run_details import RunDetails
from casp_pl.callbacks.stage_table import HEADER, stage_cells, stage_title
from casp_pl.data.images import ImageRefusedError

__all__ = ["report_html"]

_LINKS = {  # picture -> its name in the contents, which is to be short
    "bits": "Bits",
    "proxy_loss": "Errors",
    "attention_sparsity": "Sparsity",
    "head_sparsity": "Heads",
    "spectra": "Spectra",
    "losses": "Fine-tuning",
    "timings": "Time",
}
_MOST_EXAMPLES = 12
_MOST_SKIPPED = 200
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def report_html(report: CompressionReport, details: RunDetails) -> str:
    """The text of report.html: complete in itself, readable from 360 pixels on, on a light and on a dark screen.

    Args:
        report: what to show; images of examples are read from where it says and put into the page.
        details: what is shown beyond report.json.
    """
    environment = Environment(
        loader=PackageLoader("casp_pl.callbacks.report_html"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_printable,
    )
    pictures = {picture.name: picture for picture in report_pictures(report, details)}
    context = _words(report) | _colours() | {"pictures": {name: _drawn(pictures.get(name)) for name in TEXTS}}
    return environment.get_template("report.html.jinja").render(context).lstrip() + "\n"


def _printable(value: Any) -> Any:
    """Answers of a model may hold what no page may: control characters and halves of surrogate pairs."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _CONTROL.sub("\ufffd", value)


def _words(report: CompressionReport) -> dict[str, Any]:
    missing = [stage_title(name) for name in report.missing_stages]
    stages = [stage_cells(row) for row in report.stages]
    stages += [[name, *["not yet"] * (len(HEADER) - 1)] for name in missing]
    skipped = list(_skipped(report.data))
    more = f", the first {_MOST_SKIPPED}" if len(skipped) > _MOST_SKIPPED else ""
    return {
        "report": report,
        "contents": [
            ("summary", "Summary"),
            ("stages", "Stages"),
            ("examples", "Examples"),
            *_LINKS.items(),
            ("data", "Data"),
            ("made", "Made with"),
        ],
        "missing": " and ".join(missing),
        "cards": summary_cards(report),
        "stage_header": HEADER,
        "stages": stages,
        "final": len(report.stages) - 1,
        "measured_on": measured_on(report) or "Stages",
        "reading": READING,
        "examples": [_example(example) for example in report.examples[:_MOST_EXAMPLES]],
        "sections": list(_LINKS),
        "titles": TEXTS,
        "module_header": MODULE_HEADER,
        "modules": [module_cells(module) for module in report.modules],
        "data": [(part, count_rows(counts)) for part, counts in _parts(report.data)],
        "skipped": skipped[:_MOST_SKIPPED],
        "skipped_caption": f"Samples left out: {len(skipped)}{more}",
        "versions": [("commit", report.commit or "n/a"), *report.versions.items()],
        "machine": list(report.machine.items()),
    }


def _colours() -> dict[str, Any]:
    return {
        "light": {"series": LIGHT_SERIES, "ramp": ramp(LINE_COLOURS, 0.0, 0.62)},
        "dark": {"series": DARK_SERIES, "ramp": ramp(LINE_COLOURS, 0.42, 1.0)},
        "heat": ramp(HEAT_COLOURS),
        "dashes": [" ".join(map(str, dashes)) or "none" for dashes in DASHES],
    }


class _Drawn(NamedTuple):
    """A chart for the template; key: (CSS class, name, whether it is a mark) of each entry."""

    title: str
    svg: str
    key: list[tuple[str, str, bool]]


def _drawn(picture: Picture | None) -> dict[str, Any] | None:
    if picture is None:
        return None
    columns = ("one", "two", "three")[picture.most_in_a_row - 1]
    charts = [_Drawn(_title(chart), draw_svg(chart), _key(chart)) for chart in picture.charts]
    return {"columns": columns, "charts": charts}


def _title(chart: Chart) -> str:
    return f"{chart.title}, log scale" if isinstance(chart, Bars | Lines) and chart.log else chart.title


def _key(chart: Chart) -> list[tuple[str, str, bool]]:
    """Names of the lines that the chart wants named, and of its marks."""
    if not isinstance(chart, Lines) or (len(chart.series) == 1 and not chart.marks):
        return []
    count = len(chart.series)
    key = [(line_class(number, count, chart.ordered), chart.series[number].name, False) for number in chart.named]
    return [*key, ("dim", chart.marks, True)] if chart.marks else key


def _example(example: Example) -> dict[str, Any]:
    shown: dict[str, Any] = {"picture": None, "instead": "text only"}
    if example.image is not None:
        try:
            image = small_image(Path(example.image))
            shown = {"picture": image.uri, "width": image.size[0], "height": image.size[1]}
        except ImageRefusedError as error:
            shown["instead"] = f"image not shown: {error.reason}"
    same = example.original.strip().lower() == example.compressed.strip().lower()
    words = {name: getattr(example, name) for name in ("question", "original", "compressed", "reference")}
    return shown | words | {"same": same}


def _parts(data: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(heading, counts) without the lists of samples left out, which have a table of their own."""
    loose = {key: value for key, value in data.items() if not isinstance(value, Mapping) and key != "skipped"}
    if loose:
        yield "data", loose
    for part, counts in data.items():
        if isinstance(counts, Mapping):
            yield part, {key: value for key, value in counts.items() if key != "skipped"}


def _skipped(data: Mapping[str, Any], part: str = "") -> Iterator[tuple[str, str, str]]:
    """(sample, part of the data, reason) of everything that was left out."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _skipped(value, key)
        elif key == "skipped":
            yield from ((str(item["id"]), part, str(item["reason"])) for item in value)
