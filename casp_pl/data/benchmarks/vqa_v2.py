r"""VQAv2 (Goyal et al., CVPR 2017): ten answers a question. The answers of its test split are not public: use val2014.

`v2_OpenEnded_mscoco_val2014_questions.json` and `v2_mscoco_val2014_annotations.json`:

{"questions": [{"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}]}
{"annotations": [{"question_id": 262148000, "image_id": 262148, "answer_type": "other",
                  "answers": [{"answer": "down", "answer_confidence": "yes", "answer_id": 1}, ...], ...}]}
"""

from pathlib import Path

from casp_pl.data.benchmarks.base import Benchmark, Prompt, read_json
from casp_pl.data.sample import Sample

__all__ = ["VQAv2"]


class VQAv2(Benchmark):
    """VQAv2's questions; the category is the type of the answer (yes/no, number, other).

    Args:
        path: the file of questions.
        annotations: the file of answers.
        image_folder: COCO's val2014 images.
        prompt: the question as the model reads it.
        image_name: name of an image, from its number.
    """

    def __init__(
        self,
        *,
        path: Path,
        annotations: Path,
        image_folder: Path,
        prompt: str = "{question}",
        image_name: str = "COCO_val2014_{:012d}.jpg",
    ) -> None:
        self.path = Path(path)
        self.annotations = Path(annotations)
        self.image_folder = Path(image_folder)
        self.prompt = Prompt(prompt, "question")
        self.image_name = image_name

    def questions(self) -> list[Sample]:
        """In the order of the file of questions."""
        known = {row["question_id"]: row for row in read_json(self.annotations)["annotations"]}
        return [
            self.prompt.sample(
                f"vqav2/{row['question_id']}",
                self.image_folder / self.image_name.format(row["image_id"]),
                [answer["answer"] for answer in known[row["question_id"]]["answers"]],
                known[row["question_id"]].get("answer_type", ""),
                question=row["question"],
            )
            for row in read_json(self.path)["questions"]
        ]
