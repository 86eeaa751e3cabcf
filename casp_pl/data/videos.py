"""A video is a folder of its frames: images whose names, sorted, stand in the order of time.

Frames of a file: `ffmpeg -i film.mp4 -vf fps=1 film/%04d.png`.
"""

from pathlib import Path
from typing import TypeAlias

from PIL import Image

from casp_pl.data.images import ImageRefusedError, load_image

__all__ = ["VIDEO_FRAMES", "Visual", "is_video", "load_visual", "visual_token_id"]

VIDEO_FRAMES = 8
"""Every video is read as so many frames, evenly spread: a batch needs as many of each, and so do its tokens."""

_FILES = (".mp4", ".avi", ".mov", ".mkv", ".webm")

Visual: TypeAlias = Image.Image | list[Image.Image]
"""An image, or the frames of a video."""


def is_video(path: Path | None) -> bool:
    """Whether a sample's picture is a video, that is, a folder of frames."""
    return path is not None and path.is_dir()


def load_visual(path: Path, *, frames: int = VIDEO_FRAMES) -> Visual:
    """The image, or `frames` frames of the video; a short one repeats some.

    Raises:
        ImageRefusedError: it, or one of the frames, cannot be used; see `load_image`.
    """
    if not is_video(path):
        if path.suffix.lower() in _FILES:
            raise ImageRefusedError(path, "a video file; give a folder of its frames, as ffmpeg writes it")
        return load_image(path)
    names = sorted(name for name in path.iterdir() if name.is_file() and not name.name.startswith("."))
    if not names:
        raise ImageRefusedError(path, "a folder without frames")
    return [load_image(names[number * len(names) // frames]) for number in range(frames)]


def visual_token_id(processor: object, path: Path | None) -> int | None:
    """The token that stands for a patch of this image or video; None where the processor takes no such thing."""
    token: int | None = getattr(processor, "video_token_id" if is_video(path) else "image_token_id", None)
    return token
