"""report.md: the figures of a run for people to read."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from casp_pl.callbacks.report import CompressionReport, ModuleFigures
from casp_pl.callbacks.stage_table import HEADER, duration, number, size, stage_cells

__all__ = ["markdown_table", "report_markdown"]

_READING = """\
- **bits** count against the original weights of the compressed linears: the codes alone, and with every codebook, scale
  and zero counted. **size** is the whole model as stored, with the vision tower, the projector, the embeddings and the
  norms, which stay in 16 or 32 bit.
- **VQA %** is the share of generated answers that are right, with its 95 % interval; **not yes/no** leaves out the
  questions that a guess gets right half the time; **flips** are answers that differ from the original model's.
- **perplexity** and **KL** (nats, from the original's next-token distribution) are measured on held-out text. Lower is
  better; the original's KL is 0 by definition.
- **RTN** rounds every weight to the nearest level without looking at any data: the baseline, not part of the model.
- n/a: not measured, or does not apply."""

_CAPTIONS = {
    "stages": "The stages",
    "bits": "Bits and ranks that were chosen, and the scores that led to them",
    "proxy_loss": "Error of every linear on its own inputs, relative to its output",
    "attention_sparsity": "Attention sparsity of the original model, by query and key modality",
    "examples": "Example questions",
}


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
        _measured_on(report),
        "## How to read it\n\n" + _READING,
        *(f"## {_CAPTIONS.get(name, name)}\n\n![{_CAPTIONS.get(name, name)}]({name}.png)" for name in pictures),
        "## Data that really entered\n\n" + _data(report),
        "## Every linear\n\n" + markdown_table(_MODULE_HEADER, (_module_cells(module) for module in report.modules)),
        "## Made with\n\n" + _made_with(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(report: CompressionReport) -> str:
    whole = f"Wall time {duration(report.wall_seconds)}, peak memory {size(report.peak_memory_bytes)}."
    parts = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in report.work_seconds.items())
    return f"{whole} Without evaluations: {parts}." if parts else whole


def _measured_on(report: CompressionReport) -> str:
    counts = sorted({(row.questions, row.text_tokens) for row in report.stages}, key=str)
    each = [f"{_count(questions)} questions and {_count(tokens)} tokens of text" for questions, tokens in counts]
    return f"Measured on {'; '.join(each)}." if each else ""


def _data(report: CompressionReport) -> str:
    if not report.data:
        return "n/a"
    rows = ([key.replace("_", " "), _value(value)] for key, value in _flat(report.data))
    return markdown_table(("what", "count"), rows)


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}: ")
        else:
            yield prefix + key, value


_MODULE_HEADER = ("linear", "shape", "rank", "bits", "bits total", "relative proxy loss", "seconds")


def _module_cells(module: ModuleFigures) -> list[str]:
    loss = module.relative_proxy_loss
    return [
        f"`{module.name}`",
        " x ".join(map(str, module.shape)),
        "-" if module.rank is None else str(module.rank),
        "n/a" if module.bits is None else f"{module.bits:g}",
        number(module.bits_total, 3),
        "n/a" if loss is None else f"{loss:.3g}",
        number(module.seconds, 1),
    ]


def _made_with(report: CompressionReport) -> str:
    lines = [f"- commit: {report.commit or 'n/a'}"]
    lines += [f"- {name} {version}" for name, version in report.versions.items()]
    return "\n".join(lines)


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
