"""Answers compared as normalised text."""

import re

__all__ = ["is_yes_no", "normalise_answer"]

_NOT_A_WORD = re.compile(r"[^\w\s]")
_ARTICLES = frozenset({"a", "an", "the"})


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces: "A circle." becomes "circle"."""
    words = _NOT_A_WORD.sub(" ", text.casefold()).split()
    return " ".join(word for word in words if word not in _ARTICLES)


def is_yes_no(answer: str) -> bool:
    """Whether an expected answer is yes or no, which a coin gets right half of the time."""
    return normalise_answer(answer) in ("yes", "no")
