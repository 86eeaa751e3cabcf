r"""MME (Fu et al., 2023): 14 abilities, two questions an image, one answered by yes and one by no.

A folder for each ability. Images and text files lie side by side in it, or in `images/` and `questions_answers_YN/`. A
text file has the name of its image and two lines, question and answer separated by a tab:

Is there a red car in the image? Please answer yes or no.	Yes
Is there a blue car in the image? Please answer yes or no.	No
"""

from pathlib import Path

from casp_pl.data.benchmarks.base import Benchmark, Prompt
from casp_pl.data.sample import Sample
from casp_pl.errors import InputError

__all__ = ["MME"]

_IMAGES = (".jpg", ".png", ".jpeg")


class MME(Benchmark):
    """MME's questions; the category is the ability.

    Args:
        path: the folder MME_Benchmark_release_version (or MME_Benchmark), which holds one folder an ability.
        prompt: the question as the model reads it.
        short: leave out "Please answer yes or no.", as LLaVA does.
    """

    def __init__(self, *, path: Path, prompt: str = "{question}", short: bool = True) -> None:
        self.path = Path(path)
        self.prompt = Prompt(prompt, "question")
        self.short = short

    def questions(self) -> list[Sample]:
        """Abilities and images by name."""
        if not self.path.is_dir():
            raise InputError(f"MME: the folder {self.path} does not exist")
        samples = []
        for folder in sorted(entry for entry in self.path.iterdir() if entry.is_dir()):
            apart = (folder / "images").is_dir()
            texts, images = (folder / "questions_answers_YN", folder / "images") if apart else (folder, folder)
            for file in sorted(texts.glob("*.txt")):
                samples += self._pair(file, images, folder.name)
        return samples

    def _pair(self, file: Path, images: Path, ability: str) -> list[Sample]:
        image = next((path for path in (images / (file.stem + end) for end in _IMAGES) if path.is_file()), None)
        if image is None:
            raise InputError(f"MME: {file} has no image {images / file.stem}.jpg or .png")
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        pairs = [line.rsplit("\t", 1) for line in lines]
        if len(pairs) != 2 or any(len(pair) != 2 for pair in pairs):
            raise InputError(f"MME: {file} does not hold two lines of a question, a tab and an answer")
        return [
            self.prompt.sample(
                f"mme/{ability}/{file.stem}/{number}", image, [answer.strip()], ability, question=self._asked(question)
            )
            for number, (question, answer) in enumerate(pairs)
        ]

    def _asked(self, question: str) -> str:
        return question.replace("Please answer yes or no.", "").strip() if self.short else question.strip()
