r"""SEED-Bench (Li et al., CVPR 2024): four options a question; here the questions about images.

`SEED-Bench.json`; images have no ending in their names:

{"questions": [{"question_id": "101669", "question": "How many towels are in the image?", "choice_a": "One",
  "choice_b": "Two", "choice_c": "Three", "choice_d": "Four", "answer": "A", "data_id": "1454426_2591111986",
  "data_type": "image", "question_type_id": 5}], "question_type": {"Instances Counting": 5, ...}}
"""

from pathlib import Path

from casp_pl.data.benchmarks.base import Benchmark, Prompt, lettered, read_json
from casp_pl.data.sample import Sample

__all__ = ["SEEDBench"]


class SEEDBench(Benchmark):
    """SEED-Bench's questions about images; the category is the type of the question.

    Args:
        path: SEED-Bench.json.
        image_folder: the folder SEED-Bench-image.
        prompt: the question as the model reads it.
    """

    def __init__(self, *, path: Path, image_folder: Path, prompt: str = "{question}\n{options}") -> None:
        self.path = Path(path)
        self.image_folder = Path(image_folder)
        self.prompt = Prompt(prompt, "question", "options")

    def questions(self) -> list[Sample]:
        """In the order of the file."""
        content = read_json(self.path)
        types = {number: name for name, number in content.get("question_type", {}).items()}
        return [
            self.prompt.sample(
                f"seedbench/{row['question_id']}",
                self.image_folder / row["data_id"],
                [row["answer"]],
                types.get(row["question_type_id"], str(row["question_type_id"])),
                question=row["question"],
                options=lettered(row[f"choice_{option}"] for option in "abcd"),
            )
            for row in content["questions"]
            if row["data_type"] == "image"
        ]
