"""Questions, answers and images of one row as a sample; what does not fit together is refused with the reason."""

import re
from collections.abc import Sequence
from pathlib import Path

from casp_pl.data.images import ImageSource
from casp_pl.data.sample import IMAGE_MARK, Sample, Turn
from casp_pl.errors import InputError

__all__ = ["MalformedError", "check_texts", "image_file", "make_sample", "split_turns"]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_HALF = re.compile("[\ud800-\udfff]")


class MalformedError(ValueError):
    """A row that is no sample; its source skips it and tells where it stands."""


def split_turns(conversation: Sequence[dict[str, str]]) -> tuple[list[str], list[str]]:
    """Questions and answers of a conversation: {"from", "value"} with human and gpt, or {"role", "content"}.

    Raises:
        MalformedError: the turns do not alternate, or something else is in them.
    """
    try:
        roles = [part["from"] if "from" in part else part["role"] for part in conversation]
        texts = [part["value"] if "value" in part else part["content"] for part in conversation]
    except (KeyError, TypeError) as error:
        raise MalformedError(f"not a LLaVA conversation ({type(error).__name__}: {error})") from error
    if not roles or [_ROLES.get(role) for role in roles] != ["user", "assistant"] * (len(roles) // 2):
        raise MalformedError(f"the turns are {roles[:6]}, not human, gpt, human, gpt, ...")
    if not all(isinstance(text, str) for text in texts):
        raise MalformedError("not a LLaVA conversation (a turn that is no text)")
    return texts[::2], texts[1::2]


def check_texts(*texts: str) -> None:
    """Refuses what is no Unicode: JSON may hold one half of a surrogate pair, which no tokenizer and no file takes.

    Raises:
        MalformedError: with the half, as JSON writes it.
    """
    half = next(filter(None, map(_HALF.search, texts)), None)
    if half is not None:
        raise MalformedError(f"one half of a surrogate pair in the text (\\u{ord(half[0]):04x})")


def make_sample(
    name: str, questions: Sequence[str], answers: Sequence[str], images: Sequence[ImageSource], *, marks: int | None
) -> Sample:
    """A conversation with its images where the marks are; a single one goes in front of the first question.

    Args:
        name: id of the sample.
        questions: of the user, with image marks.
        answers: as many.
        images: in the order of their marks.
        marks: how many marks there must be; None where they may also be left out, for images in front.

    Raises:
        MalformedError: the number of marks is not that of the images, an answer has one, or a text is no Unicode.
    """
    check_texts(*questions, *answers)
    found = sum(text.count(IMAGE_MARK) for text in [*questions, *answers])
    if found != (marks if marks is not None else found and len(images)):
        raise MalformedError(f"{found} {IMAGE_MARK} marks in the text, but {len(images)} images")
    if any(IMAGE_MARK in answer for answer in answers):
        raise MalformedError(f"an {IMAGE_MARK} mark belongs in a question, one is in an answer")
    turns = [Turn(question, answer) for question, answer in zip(questions, answers, strict=True)]
    if len(images) == 1 and IMAGE_MARK in questions[0]:  # as LLaVA itself does, wherever in the question it stands
        turns[0] = Turn(questions[0].replace(IMAGE_MARK, "").strip(), answers[0])
    return Sample(id=name, turns=tuple(turns), images=tuple(images))


def image_file(folder: Path, image: str, name: str) -> Path:
    """The file of an image in its folder.

    Raises:
        InputError: the name points out of the folder.
        MalformedError: the name is no Unicode.
    """
    check_texts(image)
    if Path(image).is_absolute() or ".." in Path(image).parts:
        raise InputError(f"Sample {name}: the image {image} lies outside the image folder")
    return folder / image
