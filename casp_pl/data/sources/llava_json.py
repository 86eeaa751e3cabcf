r"""LLaVA's instruction data: a JSON list of conversations and a folder of images.

One conversation, two turns or more, of which the first has the mark of the image:

{"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": [
    {"from": "human", "value": "<image>\nWhat colour is the bus?"}, {"from": "gpt", "value": "White and red."}]}
"""

import json
from pathlib import Path
from typing import Any

from casp_pl.data.sample import Sample, Turn
from casp_pl.data.sources.base import DataSource, Split
from casp_pl.errors import ConfigError, InputError

__all__ = ["LlavaJson"]

_PLACEHOLDER = "<image>"


class LlavaJson(DataSource):
    """Conversations in LLaVA's JSON format, with one image each or none.

    Args:
        path: the JSON file (a list of conversations) for calibration.
        image_folder: the folder that the image names in the file are relative to.
        test_path: a JSON file of the same form for evaluation; without it there is no test split.
    """

    def __init__(self, *, path: Path, image_folder: Path, test_path: Path | None = None) -> None:
        self.path = Path(path)
        self.image_folder = Path(image_folder)
        self.test_path = None if test_path is None else Path(test_path)

    def load(self, split: Split) -> list[Sample]:
        """One sample per conversation, in the order of the file.

        Raises:
            InputError: a missing or malformed file, or a sample whose `<image>` marks do not match its images.
            ConfigError: the test split is wanted and `test_path` is not set.
        """
        path = self.path if split == "train" else self.test_path
        if path is None:
            raise ConfigError("LlavaJson has no test split: set test_path to a JSON file of held-out conversations")
        if not self.image_folder.is_dir():
            raise InputError(f"LlavaJson: the image folder {self.image_folder} does not exist")
        rows = _read_list(path)
        return [_to_sample(row, number, path, self.image_folder) for number, row in enumerate(rows)]


def _read_list(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"LlavaJson: cannot read {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(rows, list):
        raise InputError(f"LlavaJson: {path} holds a {type(rows).__name__}, not a list of conversations")
    return rows


def _to_sample(row: Any, number: int, path: Path, image_folder: Path) -> Sample:
    name = f"{path.name}#{number}"
    if isinstance(row, dict) and isinstance(row.get("id"), str | int):
        name = f"{name}/{row['id']}"
    try:
        questions, answers = _questions_and_answers(row["conversations"], name)
        images = row.get("image") or []
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"Sample {name}: not a LLaVA conversation ({type(error).__name__}: {error})") from error
    images = [images] if isinstance(images, str) else list(images)
    marks = sum(text.count(_PLACEHOLDER) for text in [*questions, *answers])
    if marks != len(images):
        raise InputError(f"Sample {name}: {marks} {_PLACEHOLDER} marks in the text, but {len(images)} images")
    if marks > 1 or marks != questions[0].count(_PLACEHOLDER):
        raise InputError(f"Sample {name}: only one image, marked in the first question, is supported")
    questions[0] = questions[0].replace(_PLACEHOLDER, "").strip()
    turns = tuple(Turn(question, answer) for question, answer in zip(questions, answers, strict=True))
    return Sample(id=name, turns=turns, image=_inside(image_folder, images[0], name) if images else None)


def _questions_and_answers(conversation: list[dict[str, str]], name: str) -> tuple[list[str], list[str]]:
    roles = [part["from"] for part in conversation]
    if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
        raise InputError(f"Sample {name}: the turns are {roles[:6]}, not human, gpt, human, gpt, ...")
    return [part["value"] for part in conversation[::2]], [part["value"] for part in conversation[1::2]]


def _inside(folder: Path, image: str, name: str) -> Path:
    if Path(image).is_absolute() or ".." in Path(image).parts:
        raise InputError(f"Sample {name}: the image {image} lies outside the image folder")
    return folder / image
