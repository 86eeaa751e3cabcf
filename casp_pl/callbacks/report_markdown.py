"""report.md: the figures of a run for people to read."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from casp_pl.callbacks.report import CompressionReport, ModuleFigures
from casp_pl.callbacks.report_charts import TEXTS
from casp_pl.callbacks.stage_table import HEADER, duration, number, size, stage_cells

__all__ = [
    "MODULE_HEADER",
    "READING",
    "count_rows",
    "markdown_table",
    "measured_on",
    "module_cells",
    "report_markdown",
]

READING = (
    "Bits count against the original weights of the compressed linears: the codes alone, and with every codebook, "
    "scale and zero counted. The size is that of the whole model as stored, with the vision tower, the projector, the "
    "embeddings and the norms, which stay in 16 or 32 bit.",
    "VQA % is the share of generated answers that are right, with its 95 % interval; not yes/no leaves out the "
    "questions that a guess gets right half the time; flips are answers that differ from the original model's.",
    "Perplexity and KL (nats, from the original's next-token distribution) are measured on held-out text. Lower is "
    "better; the original's KL is 0 by definition.",
    "RTN rounds every weight to the nearest level without looking at any data: the baseline, not part of the model.",
    "n/a: not measured, not finite, or does not apply.",
)

_EXAMPLES = "Example questions"


def report_markdown(report: CompressionReport, pictures: Sequence[str] = ()) -> str:
    """The text of report.md.

    Args:
        report: what to show.
        pictures: names of the pictures that lie beside it as NAME.png.
    """
    parts = [
        f"# {report.name}: {report.model} compressed with {report.quantizer}",
        _summary(report),
        markdown_table(HEADER, (stage_cells(row) for row in report.stages)),
        measured_on(report),
        "## How to read it\n\n" + "\n".join(f"- {line}" for line in READING),
        *map(_picture, pictures),
        "## Data that really entered\n\n" + _data(report),
        "## Every linear\n\n"
        + markdown_table(MODULE_HEADER, (_code_first(module_cells(module)) for module in report.modules)),
        "## Made with\n\n" + _made_with(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(report: CompressionReport) -> str:
    whole = f"Wall time {duration(report.wall_seconds)}, peak memory {size(report.peak_memory_bytes)}."
    parts = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in report.work_seconds.items())
    return f"{whole} Without evaluations: {parts}." if parts else whole


def _picture(name: str) -> str:
    title, words = TEXTS.get(name, (_EXAMPLES, ""))
    return "\n\n".join(part for part in (f"## {title}", words, f"![{title}]({name}.png)") if part)


def measured_on(report: CompressionReport) -> str:
    """How many questions and how much text the stages were measured on; empty without stages."""
    counts = sorted({(row.questions, row.text_tokens) for row in report.stages}, key=str)
    each = [f"{_count(questions)} questions and {_count(tokens)} tokens of text" for questions, tokens in counts]
    return f"Measured on {'; '.join(each)}." if each else ""


def _data(report: CompressionReport) -> str:
    return markdown_table(("what", "count"), count_rows(report.data)) if report.data else "n/a"


def count_rows(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, how much) of nested counts."""
    return [(key.replace("_", " "), _value(value)) for key, value in _flat(data)]


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}: ")
        else:
            yield prefix + key, value


MODULE_HEADER = ("linear", "shape", "rank", "bits", "bits total", "relative proxy loss", "seconds")


def module_cells(module: ModuleFigures) -> list[str]:
    """The cells of one linear under `MODULE_HEADER`."""
    loss = module.relative_proxy_loss
    return [
        module.name,
        " x ".join(map(str, module.shape)),
        "-" if module.rank is None else str(module.rank),
        "n/a" if module.bits is None else f"{module.bits:g}",
        number(module.bits_total, 3),
        "n/a" if loss is None else f"{loss:.3g}",
        number(module.seconds, 1),
    ]


def _code_first(cells: list[str]) -> list[str]:
    return [f"`{cells[0]}`", *cells[1:]]


def _made_with(report: CompressionReport) -> str:
    lines = [f"- commit: {report.commit or 'n/a'}"]
    lines += [f"- {name} {version}" for name, version in report.versions.items()]
    lines += [f"- {part}: {what}" for part, what in report.machine.items()]
    return "\n".join(lines) + (f"\n\n    {report.command}" if report.command else "")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; the first column names the rows, the others are right-aligned."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _count(value: int | None) -> str:
    return "n/a" if value is None else f"{value:,}"


def _value(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        first, more = json.dumps(list(value[:3])), " ..." if len(value) > 3 else ""
        return f"{len(value):,}: {first}{more}" if value else "0"
    return value if isinstance(value, str) else json.dumps(value)
