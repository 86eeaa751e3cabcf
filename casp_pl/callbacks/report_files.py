"""Writes a report: report.json for scripts, report.md and pictures for people."""

import json
from collections.abc import Sequence
from pathlib import Path

from casp_pl.callbacks.pictures import draw_pictures, png_bytes
from casp_pl.callbacks.report import CompressionReport
from casp_pl.callbacks.report_markdown import report_markdown
from casp_pl.checkpoint.atomic import write_bytes, write_text

__all__ = ["read_report", "write_report"]


def write_report(report: CompressionReport, folder: Path) -> Sequence[str]:
    """Writes every file of the report into `folder`, each whole or not at all.

    Returns:
        Their names, in the order in which they were written: the pictures, report.md, report.json.

    Raises:
        ResourceError: the disk is full or the folder not writable.
    """
    text = json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n"
    finite = CompressionReport.from_json(json.loads(text))
    pictures = draw_pictures(finite)
    for name, figure in pictures.items():
        write_bytes(folder / f"{name}.png", png_bytes(figure))
    write_text(folder / "report.md", report_markdown(finite, list(pictures)))
    write_text(folder / "report.json", text)
    return [*(f"{name}.png" for name in pictures), "report.md", "report.json"]


def read_report(folder: Path) -> CompressionReport:
    """The report of a finished run.

    Raises:
        IntegrityError: report.json has other keys than this version writes.
    """
    return CompressionReport.from_json(json.loads((folder / "report.json").read_text(encoding="utf-8")))
