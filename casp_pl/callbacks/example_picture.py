"""The picture of example images: each with its question, the right answer and what both models say."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from PIL import Image

from casp_pl.callbacks.report import Example

__all__ = ["draw_examples"]

_COLUMNS = 4
_MOST = 12
_CELL = (3.0, 4.2)  # width and height of one example in inches: title, square frame of side _SIDE, three lines
_SIDE, _MARGIN, _TITLE = 2.7, 0.15, 0.6
_PIXELS = 256
_SAME, _OTHER = "#1b7837", "#b2182b"


def draw_examples(examples: Sequence[Example]) -> Figure | None:
    """A sheet of at most 12 examples, the compressed answer green where it equals the original's, else red.

    None without examples. An image that cannot be read leaves an empty frame that says so.
    """
    shown = list(examples[:_MOST])
    if not shown:
        return None
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    width, height = columns * _CELL[0], rows * _CELL[1]
    figure = Figure(figsize=(width, height))
    for number, example in enumerate(shown):
        left, top = (number % columns) * _CELL[0] + _MARGIN, height - (number // columns) * _CELL[1] - _TITLE
        axes = figure.add_axes((left / width, (top - _SIDE) / height, _SIDE / width, _SIDE / height))
        axes.set_axis_off()
        _draw_image(axes, example)
        _draw_words(axes, example)
    return figure


def _draw_image(axes: Any, example: Example) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    if example.image is None:
        axes.text(0.5, 0.5, "text only", ha="center", va="center", color="#777777")
        return
    try:
        with Image.open(Path(example.image)) as image:
            small = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        axes.text(0.5, 0.5, "image not readable", ha="center", va="center", color="#777777")
        return
    small.thumbnail((_PIXELS, _PIXELS))
    longest = max(small.size)
    width, height = small.width / longest, small.height / longest
    extent = ((1 - width) / 2, (1 + width) / 2, (1 - height) / 2, (1 + height) / 2)
    axes.imshow(np.asarray(small), extent=extent, interpolation="nearest")
    axes.set(xlim=(0, 1), ylim=(0, 1))


def _draw_words(axes: Any, example: Example) -> None:
    axes.set_title(_short(example.question, 2, 30), fontsize=10)
    same = example.compressed.strip().lower() == example.original.strip().lower()
    lines = [("original", example.original, "black"), ("compressed", example.compressed, _SAME if same else _OTHER)]
    if example.reference is not None:
        lines.insert(0, ("right", example.reference, "#777777"))
    for number, (label, answer, colour) in enumerate(lines):
        text = f"{label}: {_short(answer, 1, 24)}"
        axes.text(0.02, -0.04 - 0.09 * number, text, fontsize=9, va="top", color=colour, parse_math=False)
    axes.title.set_parse_math(False)


def _short(text: str, lines: int, width: int) -> str:
    """At most so many lines of so many characters; a character that the font cannot draw is a question mark."""
    font = get_font(findfont(FontProperties()))
    printable = "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "?" for c in " ".join(text.split()))
    wrapped = textwrap.wrap(printable, width)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1][: width - 3] + "..."]
    return "\n".join(wrapped) or "(nothing)"
