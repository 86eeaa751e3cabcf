"""Images decoded safely: limits are read from the header, and what cannot be decoded right is refused with a reason."""

import struct
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps

from casp_pl.errors import InputError

__all__ = [
    "MAX_ASPECT",
    "MAX_PIXELS",
    "ImageRefusedError",
    "ImageSource",
    "LazyImage",
    "StoredImage",
    "load_image",
    "refuse_too_large",
]

MAX_PIXELS = 50_000_000
"""Larger images are refused before they are decoded: 50 million pixels take 200 MB in memory."""

MAX_ASPECT = 100
"""Longest side over shortest: CLIP resizes the shortest side to its input, so a 1x20000 line would become gigabytes."""

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, OverflowError)
_BROKEN_IMAGE = (*_BROKEN, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning)


class ImageRefusedError(InputError):
    """An image that is missing, broken, too large or of a kind that we do not decode.

    Attributes:
        path: the file, or the name of what is no file of its own.
        reason: why, in a few words.
    """

    def __init__(self, path: "ImageSource", reason: str) -> None:
        super().__init__(f"Image {path}: {reason}")
        self.path = path
        self.reason = reason


class LazyImage(ABC):
    """An image that is no file of its own. Hashable; equal to another where both are the same image."""

    @abstractmethod
    def __str__(self) -> str:
        """What messages call it."""

    @abstractmethod
    def stored(self) -> Path | bytes:
        """What it is a part of, as it is stored: a file, or the bytes of one."""

    @abstractmethod
    def open(self) -> Image.Image:
        """The image, its header read and its pixels perhaps not yet.

        Raises:
            ImageRefusedError: it cannot be read.
            OSError, ValueError, ...: what Pillow raises on a broken file.
        """


ImageSource: TypeAlias = Path | LazyImage
"""What `load_image` opens: a file, or a part of one."""


@dataclass(frozen=True)
class StoredImage(LazyImage):
    """A file that lies inside of a row of a data set.

    Attributes:
        name: what it is called; images of one name are one image.
        read: gives the bytes of the file. Where the row can be read again, they are not held.
    """

    name: str
    read: Callable[[], bytes] = field(repr=False, compare=False)

    def __str__(self) -> str:
        return self.name

    def stored(self) -> bytes:
        """The bytes of the file."""
        return self.read()

    def open(self) -> Image.Image:
        """The image out of its bytes, in one of the formats that files may have."""
        data = self.read()
        if not data:
            raise ImageRefusedError(self, "empty file")
        return Image.open(BytesIO(data), formats=_FORMATS)


def load_image(path: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as 8-bit RGB, turned upright by its EXIF orientation, transparency laid on white.

    CMYK, palette and grey images are converted, 16-bit grey is scaled to 8 bits. Refused: animations, 32-bit grey and
    floating-point images, more than `max_pixels`, sides of more than 100 to 1, and every file that does not decode.

    Raises:
        ImageRefusedError: with the path and the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata does not matter here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _open_file(path) if isinstance(path, Path) else path.open() as image:
                _check_header(image, path, max_pixels)
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image), path)
    except _BROKEN_IMAGE as error:
        raise ImageRefusedError(path, f"cannot be decoded ({_first_line(error)})") from error


def refuse_too_large(path: ImageSource, size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> None:
    """A width and height that a header claims, judged before anything is decoded.

    Raises:
        ImageRefusedError: too many pixels, or one side far longer than the other.
    """
    width, height = size
    if width * height > max_pixels:
        raise ImageRefusedError(path, f"{width}x{height} pixels, more than the limit of {max_pixels:,}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageRefusedError(path, f"{width}x{height}: one side is more than {MAX_ASPECT} times the other")


def _open_file(path: Path) -> Image.Image:
    if not path.is_file():
        raise ImageRefusedError(path, "no such file")
    if path.stat().st_size == 0:
        raise ImageRefusedError(path, "empty file")
    return Image.open(path, formats=_FORMATS)


def _check_header(image: Image.Image, path: ImageSource, max_pixels: int) -> None:
    """What the header alone tells: size, shape, number of frames."""
    refuse_too_large(path, image.size, max_pixels)
    if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a photo with a preview behind it
        raise ImageRefusedError(path, f"an animation of {getattr(image, 'n_frames', 2)} frames")


def _to_rgb(image: Image.Image, path: ImageSource) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ImageRefusedError(path, f"32-bit grey (mode {image.mode}) has no defined range")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
