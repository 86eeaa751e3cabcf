"""easy-VQA: 5,000 images of one coloured shape and 48,248 questions about them, out of the package easy-vqa."""

import json
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from casp_pl.data.sample import Sample, Turn
from casp_pl.data.sources.base import DataSource, Row, Split
from casp_pl.errors import InputError

__all__ = ["EasyVQA", "load_easy_vqa"]


class EasyVQA(DataSource):
    """easy-VQA (package easy-vqa): 64x64 images, short questions, 13 different answers; one sample per question."""

    def rows(self, split: Split, start: int = 0) -> Iterator[Row]:
        """38,575 training or 9,673 test questions, those of one image next to each other."""
        return iter(load_easy_vqa(split)[start:])


def load_easy_vqa(split: Split) -> list[Sample]:
    """All questions of a split, those of one image next to each other, images by number.

    Raises:
        InputError: the package easy-vqa is not installed.
    """
    spec = find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("The easy-VQA data is missing: run `pip install easy-vqa==1.0`")
    folder = Path(spec.submodule_search_locations[0]) / "data" / split
    rows = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    by_image: dict[int, list[tuple[str, Turn]]] = defaultdict(list)
    for number, (question, answer, image) in enumerate(rows):
        by_image[image].append((f"easy-vqa/{split}/{number}", Turn(question, answer)))
    samples = []
    for image in sorted(by_image):
        path = folder / "images" / f"{image}.png"
        samples += [Sample(id=name, turns=(turn,), images=(path,)) for name, turn in by_image[image]]
    return samples
