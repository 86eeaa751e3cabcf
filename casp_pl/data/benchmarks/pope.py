r"""POPE (Li et al., EMNLP 2023): is there such an object in the image? Half of the answers are no.

`coco_pope_random.json`, `coco_pope_popular.json` and `coco_pope_adversarial.json` hold one question a line:

{"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a dog in the image?", "label": "yes"}
"""

from pathlib import Path

from casp_pl.data.benchmarks.base import Benchmark, Prompt, read_json_lines
from casp_pl.data.sample import Sample
from casp_pl.errors import InputError

__all__ = ["POPE"]


class POPE(Benchmark):
    """POPE's questions; the category is how the objects that are not there were chosen.

    Args:
        path: the folder with coco_pope_*.json, or one such file.
        image_folder: COCO's val2014 images.
        prompt: the question as the model reads it.
    """

    def __init__(self, *, path: Path, image_folder: Path, prompt: str = "{question}") -> None:
        self.path = Path(path)
        self.image_folder = Path(image_folder)
        self.prompt = Prompt(prompt, "question")

    def questions(self) -> list[Sample]:
        """The files by name, their questions in order."""
        files = sorted(self.path.glob("coco_pope_*.json")) if self.path.is_dir() else [self.path]
        if not files:
            raise InputError(f"POPE: there is no coco_pope_*.json in {self.path}")
        return [
            self.prompt.sample(
                f"pope/{category}/{row['question_id']}",
                self.image_folder / row["image"],
                [row["label"]],
                category,
                question=row["text"],
            )
            for file, category in ((file, file.stem.removeprefix("coco_pope_")) for file in files)
            for row in read_json_lines(file)
        ]
