r"""GQA (Hudson and Manning, CVPR 2019): compositional questions about scenes.

`testdev_balanced_questions.json` maps ids to questions:

{"201307251": {"question": "Is it overcast?", "imageId": "n161313", "answer": "no", "fullAnswer": "No, it is clear.",
               "types": {"structural": "verify", "semantic": "global", "detailed": "weatherVerify"}, ...}}
"""

from pathlib import Path

from casp_pl.data.benchmarks.base import Benchmark, Prompt, read_json
from casp_pl.data.sample import Sample

__all__ = ["GQA"]


class GQA(Benchmark):
    """GQA's questions; the category is their structural type (verify, query, choose, logical, compare).

    Args:
        path: testdev_balanced_questions.json, or another file of this form that has answers.
        image_folder: GQA's images.
        prompt: the question as the model reads it.
    """

    def __init__(self, *, path: Path, image_folder: Path, prompt: str = "{question}") -> None:
        self.path = Path(path)
        self.image_folder = Path(image_folder)
        self.prompt = Prompt(prompt, "question")

    def questions(self) -> list[Sample]:
        """In the order of the file."""
        return [
            self.prompt.sample(
                f"gqa/{number}",
                self.image_folder / f"{row['imageId']}.jpg",
                [row["answer"]],
                row.get("types", {}).get("structural", ""),
                question=row["question"],
            )
            for number, row in read_json(self.path).items()
        ]
