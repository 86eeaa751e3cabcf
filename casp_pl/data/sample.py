"""One calibration or evaluation sample: a conversation, with or without an image, or plain text."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Sample", "Turn"]


@dataclass(frozen=True)
class Turn:
    """A question of the user and the answer that the assistant should give."""

    question: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """Either `turns` (and at most one image, which belongs in front of the first question) or `text`.

    Attributes:
        id: unique name, shown in every message about the sample.
        turns: the conversation; empty for plain text.
        text: the plain text; None for a conversation.
        image: path of the image; None for samples without one.
        answers: of a benchmark question, all answers that count, such as those of ten people; empty where the answer
            of the first turn is the only one.
        category: of a benchmark question, the part of the benchmark that it belongs to.
    """

    id: str
    turns: tuple[Turn, ...] = ()
    text: str | None = None
    image: Path | None = None
    answers: tuple[str, ...] = ()
    category: str = ""

    def __post_init__(self) -> None:
        if bool(self.turns) == (self.text is not None):
            raise ValueError(f"Sample {self.id} needs either turns or text")
        if self.text is not None and self.image is not None:
            raise ValueError(f"Sample {self.id} is plain text and cannot have an image")
