"""Lines of text: broken between words where the console is too narrow; what is to be copied stays whole."""

import textwrap
from pathlib import Path

from rich.console import Console

__all__ = ["print_path", "print_text"]

_HANGING = "  "  # in front of what a line had no room for


def print_text(text: str, console: Console, *, style: str | None = None) -> None:
    """Prints `text` as it is, each of its lines broken between words where it is wider than the console.

    A word that is wider than the console (a path, the name of a module) has a line of its own and is not broken.

    Args:
        text: one or more lines; what stands in front of a line's first word stays there.
        console: where to print.
        style: of the whole text, as rich names it.
    """
    for line in text.splitlines() or [""]:
        console.print("\n".join(_broken(line, console.width)), style=style, markup=False, soft_wrap=True)


def print_path(label: str, path: Path, console: Console) -> None:
    """Prints `label: path`; where both do not fit, the path has a line of its own, blanks in it or not."""
    line = f"{label} {path}"
    console.print(line if len(line) <= console.width else f"{label.rstrip()}\n{path}", markup=False, soft_wrap=True)


def _broken(line: str, width: int) -> list[str]:
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(
        line,
        max(width, len(indent) + len(_HANGING) + 1),
        subsequent_indent=indent + _HANGING,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    ) or [""]
