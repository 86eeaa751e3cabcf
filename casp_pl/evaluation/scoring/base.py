"""What a rule does: a score for one answer, figures for all of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

__all__ = ["AnswerRule", "ScoredAnswer", "by_category", "mean_score", "scores_by_category"]


class ScoredAnswer(NamedTuple):
    """One answered question.

    Attributes:
        prediction: what the model said.
        answers: all answers that count.
        score: by the rule, 0 .. 1.
        category: part of the benchmark, may be empty.
        image: number of its image.
    """

    prediction: str
    answers: tuple[str, ...]
    score: float
    category: str
    image: int


class AnswerRule(ABC):
    """Scores answers. The mean of the scores is the accuracy; `figures` adds what else the benchmark reports."""

    @abstractmethod
    def score(self, prediction: str, answers: Sequence[str]) -> float:
        """The score of one answer, 0 .. 1, given all answers that count.

        Raises:
            InputError: the answers are not of the kind that the rule is for.
        """

    @abstractmethod
    def figures(self, rows: Sequence[ScoredAnswer]) -> dict[str, float]:
        """Further figures by name, shares as 0 .. 1."""


def mean_score(rows: Iterable[ScoredAnswer]) -> float:
    """The accuracy."""
    return fmean(row.score for row in rows)


def by_category(rows: Sequence[ScoredAnswer]) -> dict[str, list[ScoredAnswer]]:
    """The answers of each category, categories by name; empty where no question has one."""
    parts: dict[str, list[ScoredAnswer]] = {name: [] for name in sorted({row.category for row in rows} - {""})}
    for row in rows:
        if row.category:
            parts[row.category].append(row)
    return parts


def scores_by_category(rows: Sequence[ScoredAnswer]) -> dict[str, float]:
    """`accuracy, CATEGORY`: the mean score of each category."""
    return {f"accuracy, {name}": mean_score(part) for name, part in by_category(rows).items()}
