"""A sheet of small images, each with a caption: to see with one's own eyes what enters."""

import textwrap
from collections.abc import Sequence
from io import BytesIO

from PIL import Image, ImageDraw, ImageFont

from casp_pl.data.images import ImageSource, load_image

__all__ = ["contact_sheet"]

_COLUMNS = 6
_SIDE, _MARGIN, _LINE = 160, 8, 13  # pixels: of an image at most, between images, of a line of text
_LINES, _CHARACTERS = 4, 26  # of a caption


def contact_sheet(entries: Sequence[tuple[ImageSource, str]]) -> bytes:
    """A PNG of the images with their captions, six in a row.

    Args:
        entries: image and caption; at least one.

    Raises:
        ImageRefusedError: an image that was readable when the data was set up no longer is.
    """
    columns = min(_COLUMNS, len(entries))
    width, height = _SIDE + 2 * _MARGIN, _SIDE + 2 * _MARGIN + _LINES * _LINE
    sheet = Image.new("RGB", (columns * width, -(-len(entries) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for number, (source, caption) in enumerate(entries):
        left, top = number % columns * width + _MARGIN, number // columns * height + _MARGIN
        image = load_image(source)
        image.thumbnail((_SIDE, _SIDE))
        sheet.paste(image, (left + (_SIDE - image.width) // 2, top + (_SIDE - image.height) // 2))
        for line, text in enumerate(_wrapped(caption)):
            draw.text((left, top + _SIDE + 2 + line * _LINE), text, fill="black", font=font)
    output = BytesIO()
    sheet.save(output, format="PNG")
    return output.getvalue()


def _wrapped(caption: str) -> list[str]:
    """At most four lines; what the font cannot draw is a question mark."""
    plain = caption.encode("latin-1", "replace").decode("latin-1")
    return textwrap.wrap(plain, _CHARACTERS, max_lines=_LINES, placeholder=" ...", break_long_words=True)
