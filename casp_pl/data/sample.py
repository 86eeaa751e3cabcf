"""One calibration or evaluation sample: a conversation, with or without images, or plain text."""

from dataclasses import dataclass

from casp_pl.data.images import ImageSource

__all__ = ["IMAGE_MARK", "Sample", "Turn"]

IMAGE_MARK = "<image>"
"""Where an image belongs in a question."""


@dataclass(frozen=True)
class Turn:
    """A question of the user and the answer that the assistant should give.

    The question may hold `IMAGE_MARK`s: each stands for the next image of the sample.
    """

    question: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """Either `turns` (and any number of images) or `text`.

    Where no question has an image mark, all images belong in front of the first question.

    Attributes:
        id: unique name, shown in every message about the sample.
        turns: the conversation; empty for plain text.
        text: the plain text; None for a conversation.
        images: what is opened when it is used, a file or a part of one; empty for samples without images. The frames
            of a video are images in their order.
        video: as how many frames a model that knows videos is given them all, as one video; 0 where the images are no
            frames. Other models get the frames as images.
        answers: of a benchmark question, all answers that count, such as those of ten people; empty where the answer
            of the first turn is the only one.
        category: of a benchmark question, the part of the benchmark that it belongs to.
    """

    id: str
    turns: tuple[Turn, ...] = ()
    text: str | None = None
    images: tuple[ImageSource, ...] = ()
    video: int = 0
    answers: tuple[str, ...] = ()
    category: str = ""

    def __post_init__(self) -> None:
        if bool(self.turns) == (self.text is not None):
            raise ValueError(f"Sample {self.id} needs either turns or text")
        if self.text is not None and self.images:
            raise ValueError(f"Sample {self.id} is plain text and cannot have an image")

    @property
    def image(self) -> ImageSource | None:
        """The first image, None without one."""
        return self.images[0] if self.images else None
