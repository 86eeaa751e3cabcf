"""Writes a report: report.json for scripts; report.html, report.md and pictures for people."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from casp_pl.callbacks.example_images import FOLDER, keep_images
from casp_pl.callbacks.pictures import draw_pictures, png_bytes
from casp_pl.callbacks.report import CompressionReport
from casp_pl.callbacks.report_html import report_html
from casp_pl.callbacks.report_markdown import report_markdown
from casp_pl.callbacks.run_details import RunDetails
from casp_pl.checkpoint import write_bytes, write_text

__all__ = ["read_report", "write_report"]


def write_report(
    report: CompressionReport, folder: Path, details: RunDetails, *, draw: bool = True
) -> tuple[list[str], Mapping[str, Figure]]:
    """Writes every file of the report into `folder`, each whole or not at all.

    Args:
        report: the figures.
        folder: the run's directory.
        details: what is shown beyond them.
        draw: whether to draw the pictures beside report.md, which takes seconds; report.html has its own.

    Returns:
        Names of the files in the order in which they were written, report.json last, and the pictures by name.

    Raises:
        ResourceError: the disk is full or the folder not writable.
    """
    text = json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n"
    finite = CompressionReport.from_json(json.loads(text))
    shown = replace(finite, examples=keep_images(finite.examples, folder))
    figures = draw_pictures(shown, details) if draw else {}
    for name, figure in figures.items():
        write_bytes(folder / f"{name}.png", png_bytes(figure))
    write_text(folder / "report.md", report_markdown(shown, list(figures)))
    write_text(folder / "report.html", report_html(shown, details))
    write_text(folder / "report.json", text)
    copies = sorted(f"{FOLDER}/{path.name}" for path in (folder / FOLDER).glob("*"))
    return [*(f"{name}.png" for name in figures), *copies, "report.md", "report.html", "report.json"], figures


def read_report(folder: Path) -> CompressionReport:
    """The report of a run.

    Raises:
        IntegrityError: report.json has keys that this version does not know.
    """
    return CompressionReport.from_json(json.loads((folder / "report.json").read_text(encoding="utf-8")))
