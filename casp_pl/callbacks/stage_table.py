"""The main table of a run: one row a stage, the same words on the console and in report.md."""

from collections.abc import Sequence

from rich.console import Console

from casp_pl.callbacks.report import StageRow
from casp_pl.console import print_table

__all__ = ["HEADER", "duration", "number", "print_stages", "size", "stage_cells", "stage_title"]

HEADER = ("stage", "bits codes/total", "size", "VQA %", "95 %", "not yes/no %", "perplexity", "KL", "flips %", "time")

_TITLES = {
    "original": "original",
    "rtn": "RTN",
    "quantized": "quantized",
    "block_tuned": "block tuned",
    "end_to_end": "end to end",
}


def print_stages(stages: Sequence[StageRow], console: Console) -> None:
    """The main table on the console; one stage below the other where it is too narrow for a table."""
    print_table(HEADER, [stage_cells(row) for row in stages], console)


def stage_title(name: str) -> str:
    """The name of a stage in words."""
    return _TITLES.get(name, name)


def stage_cells(row: StageRow) -> list[str]:
    """The cells of one stage under `HEADER`; what was not measured reads n/a."""
    codes, total = number(row.bits_per_weight_codes, 3), number(row.bits_per_weight_total, 3)
    interval = "n/a" if row.vqa_interval is None else " - ".join(number(edge, 1, 100) for edge in row.vqa_interval)
    return [
        stage_title(row.name),
        "n/a" if codes == total == "n/a" else f"{codes} / {total}",
        size(row.model_bytes),
        number(row.vqa_accuracy, 1, 100),
        interval,
        number(row.vqa_accuracy_not_yes_no, 1, 100),
        number(row.perplexity, 2),
        number(row.kl, 4),
        number(row.flip_rate, 1, 100),
        duration(row.seconds),
    ]


def number(value: float | None, digits: int, factor: float = 1.0) -> str:
    """`value` times `factor` with so many digits after the point and commas at the thousands, or n/a."""
    return "n/a" if value is None else f"{value * factor:,.{digits}f}"


def size(count: int | None) -> str:
    """Bytes in decimal units: 1,000,000 bytes are 1.0 MB."""
    if count is None:
        return "n/a"
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.2f} GB"


def duration(seconds: float | None) -> str:
    """Seconds below 100 s, minutes below 100 min, else hours."""
    if seconds is None:
        return "n/a"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
