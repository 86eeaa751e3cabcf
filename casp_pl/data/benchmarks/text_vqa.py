r"""TextVQA (Singh et al., CVPR 2019): questions about text in the image, ten answers each.

`TextVQA_0.5.1_val.json`, and for the words that OCR has read `TextVQA_Rosetta_OCR_v0.2_val.json`:

{"data": [{"question_id": 34602, "image_id": "003a8ae2ef43b901", "question": "what is the brand of this camera?",
           "answers": ["nous les gosses", "dakota", ...]}]}
{"data": [{"image_id": "003a8ae2ef43b901", "ocr_tokens": ["DAKOTA", "DIGITAL"]}]}
"""

from pathlib import Path

from casp_pl.data.benchmarks.base import Benchmark, Prompt, read_json
from casp_pl.data.sample import Sample

__all__ = ["TextVQA"]


class TextVQA(Benchmark):
    """TextVQA's questions.

    Args:
        path: TextVQA_0.5.1_val.json.
        image_folder: the folder train_images, which holds the images of the validation split too.
        prompt: the question as the model reads it; `{ocr}` is "Reference OCR token: ..." with its line end, or nothing.
        ocr_path: TextVQA_Rosetta_OCR_v0.2_val.json; without it `{ocr}` is empty.
    """

    def __init__(
        self, *, path: Path, image_folder: Path, prompt: str = "{question}", ocr_path: Path | None = None
    ) -> None:
        self.path = Path(path)
        self.image_folder = Path(image_folder)
        self.prompt = Prompt(prompt, "question", "ocr")
        self.ocr_path = None if ocr_path is None else Path(ocr_path)

    def questions(self) -> list[Sample]:
        """In the order of the file."""
        words = {} if self.ocr_path is None else _read_words(self.ocr_path)
        return [
            self.prompt.sample(
                f"textvqa/{row['question_id']}",
                self.image_folder / f"{row['image_id']}.jpg",
                row["answers"],
                question=row["question"].capitalize(),
                ocr=f"Reference OCR token: {', '.join(words[row['image_id']])}\n" if words else "",
            )
            for row in read_json(self.path)["data"]
        ]


def _read_words(path: Path) -> dict[str, list[str]]:
    return {row["image_id"]: row["ocr_tokens"] for row in read_json(path)["data"]}
