r"""LLaVA's instruction data: a JSON list (or JSON lines) of conversations and a folder of images.

A conversation has one turn or more. Marks say where the images belong:

{"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": [
    {"from": "human", "value": "<image>\nWhat colour is the bus?"}, {"from": "gpt", "value": "White and red."}]}
{"id": "pair", "image": ["a.jpg", "b.jpg"], "conversations": [
    {"from": "human", "value": "<image>\n<image>\nWhat differs?"}, {"from": "gpt", "value": "The hat."}]}
{"id": "clip", "video": "clips/0001", "conversations": [
    {"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "A dog jumps."}]}
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from casp_pl.data.images import ImageRefusedError
from casp_pl.data.sample import IMAGE_MARK
from casp_pl.data.skipped import Skipped
from casp_pl.data.sources.base import DataSource, Row, Split
from casp_pl.data.sources.conversations import MalformedError, image_file, make_sample, split_turns
from casp_pl.data.sources.json_rows import JsonRow, json_rows
from casp_pl.data.video import video_frames
from casp_pl.errors import ConfigError, InputError

__all__ = ["LlavaJson"]

_VIDEO_MARK = "<video>"


class LlavaJson(DataSource):
    """Conversations in LLaVA's JSON format, with any number of images, or with a video.

    Args:
        path: the file for calibration: a JSON list of conversations, or JSON lines (.jsonl).
        image_folder: the folder that the names of images and videos in the file are relative to.
        test_path: a file of the same form for evaluation; without it there is no test split.
        frames: of a video (a folder of frames, or with PyAV a video file) that many images, evenly spread, are taken.
    """

    def __init__(self, *, path: Path, image_folder: Path, test_path: Path | None = None, frames: int = 8) -> None:
        if frames < 1:
            raise ConfigError(f"LlavaJson: frames is {frames}, it must be at least 1")
        self.path = Path(path)
        self.image_folder = Path(image_folder)
        self.test_path = None if test_path is None else Path(test_path)
        self.frames = frames

    def rows(self, split: Split, start: int = 0) -> Iterator[Row]:
        """One sample per conversation, in the order of the file.

        Skipped are rows that are no conversation, whose marks do not match their images, or whose video cannot be
        opened.

        Raises:
            InputError: a missing or malformed file, or an image outside its folder.
            ConfigError: the test split is wanted and `test_path` is not set.
        """
        path = self.path if split == "train" else self.test_path
        if path is None:
            raise ConfigError("LlavaJson has no test split: set test_path to a JSON file of held-out conversations")
        if not self.image_folder.is_dir():
            raise InputError(f"LlavaJson: the image folder {self.image_folder} does not exist")
        for number, row in enumerate(json_rows(path, start), start=start):
            yield self._row(row, f"{path.name}#{number}")

    def _row(self, row: JsonRow, name: str) -> Row:
        if isinstance(row.value, dict) and isinstance(row.value.get("id"), str | int):
            name = f"{name}/{row.value['id']}".encode(errors="backslashreplace").decode()
        try:
            if row.problem:
                raise MalformedError(row.problem)
            return self._sample(row.value, name)
        except MalformedError as error:
            return Skipped(name, f"{row.place}: {error}")

    def _sample(self, row: Any, name: str) -> Row:
        try:
            questions, answers = split_turns(row["conversations"])
            images, video = row.get("image") or [], row.get("video")
            images = [images] if isinstance(images, str) else list(images)
            files = [image_file(self.image_folder, image, name) for image in images]
        except (KeyError, TypeError, AttributeError) as error:
            raise MalformedError(f"not a LLaVA conversation ({type(error).__name__}: {error})") from error
        if video is None:
            return make_sample(name, questions, answers, files, marks=len(files))
        marks = sum(text.count(mark) for text in questions for mark in (IMAGE_MARK, _VIDEO_MARK))
        if files or marks != 1 or not isinstance(video, str):
            raise MalformedError(f"a video goes with one {_VIDEO_MARK} mark in a question, and no images")
        try:
            frames = video_frames(image_file(self.image_folder, video, name), self.frames)
        except ImageRefusedError as error:
            return Skipped(name, str(error))
        in_text = IMAGE_MARK * len(frames)
        questions = [text.replace(_VIDEO_MARK, IMAGE_MARK).replace(IMAGE_MARK, in_text) for text in questions]
        return replace(make_sample(name, questions, answers, frames, marks=len(frames)), video=self.frames)
