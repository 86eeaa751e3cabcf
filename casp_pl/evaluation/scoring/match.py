"""Answers that have to be the same text."""

from collections.abc import Sequence

from casp_pl.evaluation.answers import normalise_answer
from casp_pl.evaluation.scoring.base import AnswerRule, ScoredAnswer, scores_by_category

__all__ = ["ExactMatch", "GQAMatch"]


class ExactMatch(AnswerRule):
    """Right is what equals one of the answers in lower case, without punctuation and articles."""

    def score(self, prediction: str, answers: Sequence[str]) -> float:
        """1 or 0."""
        return float(normalise_answer(prediction) in {normalise_answer(answer) for answer in answers})

    def figures(self, rows: Sequence[ScoredAnswer]) -> dict[str, float]:
        """The accuracy of each category."""
        return scores_by_category(rows)


class GQAMatch(AnswerRule):
    """GQA's accuracy as LLaVA measures it: the same text in lower case, without full stops at the end."""

    def score(self, prediction: str, answers: Sequence[str]) -> float:
        """1 or 0."""
        return float(prediction.strip().rstrip(".").lower() in answers)

    def figures(self, rows: Sequence[ScoredAnswer]) -> dict[str, float]:
        """The accuracy of each structural type."""
        return scores_by_category(rows)
