"""Small copies of the images that a report shows, so that it can be made again where the originals are not."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from casp_pl.callbacks.report import Example
from casp_pl.checkpoint import write_bytes
from casp_pl.data.images import ImageRefusedError, load_image

__all__ = ["FOLDER", "SmallImage", "keep_images", "small_image"]

FOLDER = "examples"

_SIDE = 256  # pixels
_MOST_PNG_BYTES = 20_000  # drawings are smaller as PNG, and exact; photographs are not


@dataclass(frozen=True)
class SmallImage:
    """An encoded image.

    Attributes:
        data: of a PNG or JPEG file.
        size: (width, height) in pixels.
    """

    data: bytes
    size: tuple[int, int]

    @property
    def kind(self) -> str:
        """`png` or `jpeg`."""
        return "png" if self.data.startswith(b"\x89PNG") else "jpeg"

    @property
    def uri(self) -> str:
        """The image as a data: address."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.data).decode()}"


def small_image(path: Path) -> SmallImage:
    """The image of a file, 256 pixels at its longest side.

    Raises:
        ImageRefusedError: it is missing or cannot be decoded.
    """
    image = load_image(path)
    image.thumbnail((_SIDE, _SIDE))
    data = _encoded(image, "PNG", optimize=True)
    return SmallImage(data if len(data) <= _MOST_PNG_BYTES else _encoded(image, "JPEG", quality=85), image.size)


def keep_images(examples: Sequence[Example], folder: Path) -> tuple[Example, ...]:
    """Writes folder/examples/NUMBER.png or .jpeg; the examples that come back point there.

    An image that is gone has the copy of an earlier time, if there is one; else its example stays as it is.

    Raises:
        ResourceError: the disk is full or the folder not writable.
    """
    return tuple(_kept(example, folder / FOLDER / str(number)) for number, example in enumerate(examples))


def _kept(example: Example, stem: Path) -> Example:
    if example.image is None:
        return example
    try:
        image = small_image(Path(example.image))
    except ImageRefusedError:
        copies = [path for path in (stem.with_suffix(".png"), stem.with_suffix(".jpeg")) if path.exists()]
        return replace(example, image=str(copies[0])) if copies else example
    path = stem.with_suffix(f".{image.kind}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, image.data)
    return replace(example, image=str(path))


def _encoded(image: Image.Image, kind: str, **how: int | bool) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()
