r"""ScienceQA (Lu et al., NeurIPS 2022): school questions with options; here those with an image (SQA-IMG).

`problems.json` maps ids to questions, `pid_splits.json` splits to ids; images lie at SPLIT/ID/image.png:

{"5": {"question": "Which of these states is farthest north?", "choices": ["West Virginia", "Louisiana"], "answer": 0,
       "hint": "", "image": "image.png", "subject": "social science", "split": "test", ...}}
"""

from pathlib import Path

from casp_pl.data.benchmarks.base import Benchmark, Prompt, letter, lettered, read_json
from casp_pl.data.sample import Sample

__all__ = ["ScienceQA"]


class ScienceQA(Benchmark):
    """ScienceQA's questions that have an image; the category is the subject.

    Args:
        path: the folder with problems.json and pid_splits.json.
        image_folder: the folder that holds test/ID/image.png.
        prompt: the question as the model reads it; `{context}` is "Context: ..." with its line end, or nothing.
        part: name of the split.
    """

    def __init__(
        self, *, path: Path, image_folder: Path, prompt: str = "{context}{question}\n{options}", part: str = "test"
    ) -> None:
        self.path = Path(path)
        self.image_folder = Path(image_folder)
        self.prompt = Prompt(prompt, "question", "context", "options")
        self.part = part

    def questions(self) -> list[Sample]:
        """In the order of the split."""
        problems = read_json(self.path / "problems.json")
        chosen = ((number, problems[number]) for number in read_json(self.path / "pid_splits.json")[self.part])
        return [
            self.prompt.sample(
                f"scienceqa/{number}",
                self.image_folder / self.part / number / row["image"],
                [letter(row["answer"])],
                row.get("subject", ""),
                question=row["question"],
                context=f"Context: {row['hint']}\n" if row.get("hint") else "",
                options=lettered(row["choices"]),
            )
            for number, row in chosen
            if row["image"]
        ]
