"""Tables that stay readable on any console: in narrow ones each row becomes a short list."""

import os
import sys
from collections.abc import Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from casp_pl.console.prose import print_text

__all__ = ["make_console", "print_table"]

_PIPED_WIDTH = 120
_GAP = 3  # between two columns: both paddings and the box's own space


def make_console(file: TextIO | None = None) -> Console:
    """A console on `file` (standard output by default) that never fails on a character its encoding lacks.

    Without a terminal there are no control codes and lines are 120 columns wide unless COLUMNS says otherwise.
    """
    stream = sys.stdout if file is None else file
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
    console = Console(file=stream, highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    return console


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], console: Console, *, title: str = "") -> None:
    """Prints the rows under their header; one cell a line where they do not fit side by side.

    Args:
        header: names of the columns; the first column names the row.
        rows: cells as text.
        console: where to print.
        title: a line above the table.
    """
    if title:
        print_text(title, console)
    columns = [[name, *(row[number] for row in rows)] for number, name in enumerate(header)]
    if sum(max(map(len, cells)) for cells in columns) + _GAP * (len(columns) - 1) <= console.width:
        _print_wide(header, rows, console)
    else:
        _print_narrow(header, rows, console)


def _print_wide(header: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, header_style="bold")
    for number, name in enumerate(header):
        table.add_column(escape(name), justify="right" if number else "left", no_wrap=True, overflow="crop")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)


def _print_narrow(header: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    label = max(map(len, header[1:]), default=0)
    for row in rows:
        print_text(row[0], console, style="bold")
        for name, cell in zip(header[1:], row[1:], strict=True):
            line = f"  {name:<{label}}  {cell}"
            print_text(line if len(line) <= console.width else f"  {name}\n    {cell}", console)
