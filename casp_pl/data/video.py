"""Videos as sequences of images: a folder of frames, or a video file that PyAV reads (extra `video`)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from PIL import Image

from casp_pl.data.images import ImageRefusedError, ImageSource, LazyImage, refuse_too_large
from casp_pl.errors import InputError

__all__ = ["FRAMES", "VideoFrame", "video_frames"]

FRAMES = 8
"""Of a video where nothing else is said; models were calibrated on as many."""

T = TypeVar("T")

_FRAME_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_EARLY = 1e-3  # seconds that a frame may come before its time: containers round


@dataclass(frozen=True)
class VideoFrame(LazyImage):
    """The frame of a video file that is shown at a time.

    Attributes:
        path: the file.
        second: the time.
    """

    path: Path
    second: float

    def __str__(self) -> str:
        return f"{self.path}@{self.second:.3f}s"

    def stored(self) -> Path:
        """The file of the video."""
        return self.path

    def open(self) -> Image.Image:
        """Seek and decode; only this frame stays in memory."""
        import av

        try:
            with av.open(str(self.path)) as container:
                stream = container.streams.video[0]
                refuse_too_large(self, (stream.width, stream.height))
                container.seek(int(self.second * av.time_base), backward=True)
                last = None
                for frame in container.decode(stream):
                    last = frame
                    if frame.time is not None and frame.time >= self.second - _EARLY:
                        break
                if last is None:
                    raise ImageRefusedError(self, "no frame at that time")
                image: Image.Image = last.to_image()  # type: ignore[no-untyped-call]
                return image
        except (av.FFmpegError, IndexError) as error:
            raise ImageRefusedError(self, f"cannot be decoded ({error})") from error


def video_frames(path: Path, count: int) -> tuple[ImageSource, ...]:
    """`count` frames of a video, evenly spread; fewer where a folder holds fewer.

    Args:
        path: a folder whose image files are the frames, in the order of the numbers in their names, or a video file.
        count: at least 1.

    Raises:
        ImageRefusedError: there is no such video, or no frame in it.
        InputError: a video file, and PyAV is not installed.
    """
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() in _FRAME_FILES]
        if not files:
            raise ImageRefusedError(path, "a video folder without frames")
        return tuple(_spread(sorted(files, key=lambda file: _by_number(file.name)), count))
    if not path.is_file():
        raise ImageRefusedError(path, "no such video, neither a file nor a folder of frames")
    if find_spec("av") is None:
        raise InputError(
            f"Video {path}: video files are read by PyAV, which is missing\n"
            "Run `pip install 'casp_pl[video]'`, or give a folder of frames"
        )
    seconds = _duration(path)
    return tuple(VideoFrame(path, (2 * number + 1) * seconds / (2 * count)) for number in range(count))


def _duration(path: Path) -> float:
    """Seconds that a video file lasts."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if container.duration is not None:
                return float(container.duration / av.time_base)
            if stream.duration is not None and stream.time_base is not None:
                return float(stream.duration * stream.time_base)
    except (av.FFmpegError, IndexError) as error:
        raise ImageRefusedError(path, f"cannot be opened as a video ({error})") from error
    raise ImageRefusedError(path, "a video that does not say how long it is")


def _spread(frames: Sequence[T], count: int) -> list[T]:
    """The middles of `count` equal stretches; all where there are no more."""
    if len(frames) <= count:
        return list(frames)
    return [frames[(2 * number + 1) * len(frames) // (2 * count)] for number in range(count)]


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts frame2 before frame10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
