"""What the readers of benchmarks share: prompts, options, JSON that may be broken, images that must lie in a folder."""

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import Formatter, ascii_uppercase
from typing import Any

from casp_pl.data.sample import Sample, Turn
from casp_pl.data.sources.base import DataSource, Row, Split
from casp_pl.data.sources.conversations import check_texts
from casp_pl.errors import ConfigError, InputError

__all__ = ["Benchmark", "Prompt", "letter", "lettered", "read_json", "read_json_lines"]


class Benchmark(DataSource):
    """Questions with known answers; there is nothing to calibrate on, so the test split is the only one."""

    @abstractmethod
    def questions(self) -> list[Sample]:
        """All questions, always in the same order, each with its image, answers and category.

        Raises:
            InputError: a file is missing or is not what the benchmark publishes.
        """

    def rows(self, split: Split, start: int = 0) -> Iterator[Row]:
        """The questions from number `start` on.

        Raises:
            ConfigError: another split than the test split is wanted.
            InputError: there is no question, or as `questions` says.
        """
        name = type(self).__name__
        if split != "test":
            raise ConfigError(f"{name} is a benchmark: set evaluation.source to it, not data.source")
        try:
            samples = self.questions()
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise InputError(
                f"{name}: the file is not what the benchmark publishes ({type(error).__name__}: {error})\n"
                "docs/evaluation.md says which files are read and where they come from."
            ) from error
        if not samples:
            raise InputError(f"{name}: there is no question with an image in these files.")
        return iter(samples[start:])


class Prompt:
    """A question as the model reads it.

    Args:
        template: text with fields in braces, such as `{question}`.
        fields: the fields that it may have.

    Raises:
        ConfigError: it has another field, or lacks `{question}`.
    """

    def __init__(self, template: str, *fields: str) -> None:
        try:
            used = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise ConfigError(f"prompt {template!r}: {error}") from error
        if "question" not in used or not used <= set(fields):
            known = ", ".join(f"{{{field}}}" for field in fields)
            raise ConfigError(f"prompt {template!r} needs {{question}} and may have no other fields than {known}")
        self.template = template

    def sample(self, id: str, image: Path, answers: Sequence[str], category: str = "", **fields: str) -> Sample:
        """One question of the benchmark; the most common answer stands for all where one is shown.

        Raises:
            MalformedError: a text is no Unicode.
        """
        turn = Turn(self.template.format(**fields), Counter(answers).most_common(1)[0][0])
        check_texts(turn.question, *answers)
        return Sample(id=id, turns=(turn,), images=(image,), answers=tuple(answers), category=category)


def lettered(options: Iterable[str]) -> str:
    """The options one a line: `A. red`, `B. blue`."""
    return "\n".join(f"{letter(number)}. {option}" for number, option in enumerate(options))


def letter(number: int) -> str:
    """0 is A, 1 is B."""
    return ascii_uppercase[number]


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: it cannot be read.
    """
    return _parsed(_text(path), path)


def read_json_lines(path: Path) -> list[Any]:
    """One value a line; blank lines are left out.

    Raises:
        InputError: it cannot be read; the message has the line.
    """
    lines = enumerate(_text(path).splitlines(), start=1)
    return [_parsed(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}\ndocs/evaluation.md says where it comes from.") from error


def _parsed(text: str, where: Path | str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from error
