"""What a task of lmms-eval asks, as one of our samples, so that the model sees it as it saw its training data."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from casp_pl.data.images import LazyImage
from casp_pl.data.sample import IMAGE_MARK, Sample, Turn
from casp_pl.data.tokenize import Processor, takes_images, takes_videos
from casp_pl.data.video import FRAMES, video_frames
from casp_pl.errors import ConfigError

__all__ = ["question_sample"]

_VIDEO_MARK = "<video>"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Shown(LazyImage):
    """An image that the task has opened."""

    name: str
    image: Image.Image

    def __str__(self) -> str:
        return self.name

    def stored(self) -> bytes:
        return self.image.tobytes()

    def open(self) -> Image.Image:
        return self.image.copy()  # whoever opens an image closes it


def question_sample(name: str, text: str, visuals: Sequence[Any], processor: Processor, answer: str = "") -> Sample:
    """A question with its images where their marks are, in front of the text where it has none; or with its video.

    Args:
        name: what messages call it.
        text: of the question, with `<image>` and `<video>` marks or without.
        visuals: Pillow's images, or one path of a video: a file or a folder of frames.
        processor: of the model.
        answer: what is to be scored.

    Raises:
        ConfigError: the model does not take what the task shows.
        ImageRefusedError: a video that cannot be read.
    """
    _refuse_unfit(visuals, processor)
    found = text.count(IMAGE_MARK) + text.count(_VIDEO_MARK)
    if found not in (0, len(visuals)):
        _LOG.warning("%s: %d image marks for %d images: all go in front of the text", name, found, len(visuals))
        text = text.replace(IMAGE_MARK, "").replace(_VIDEO_MARK, "")
    text = text.strip()
    if visuals and isinstance(visuals[0], str | Path):
        frames = video_frames(Path(visuals[0]), FRAMES)
        text = text.replace(_VIDEO_MARK, IMAGE_MARK).replace(IMAGE_MARK, IMAGE_MARK * len(frames))
        return Sample(id=name, turns=(Turn(text, answer),), images=frames, video=FRAMES)
    images = tuple(_Shown(f"{name}, image {number}", image) for number, image in enumerate(visuals))
    return Sample(id=name, turns=(Turn(text, answer),), images=images)


def _refuse_unfit(visuals: Sequence[Any], processor: Processor) -> None:
    if not visuals:
        return
    if not takes_images(processor):
        raise ConfigError("lmms_eval: the task shows images, the model takes text alone")
    if all(isinstance(visual, Image.Image) for visual in visuals):
        return
    if len(visuals) > 1 or not isinstance(visuals[0], str | Path):
        kinds = ", ".join(sorted({type(visual).__name__ for visual in visuals}))
        raise ConfigError(f"lmms_eval: the task shows {kinds}; images or one path of a video are possible")
    if not takes_videos(processor):
        raise ConfigError("lmms_eval: the task shows videos, the model takes images alone")
