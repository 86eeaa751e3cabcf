"""Questions that are answered by yes or no: POPE and MME."""

import re
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from casp_pl.evaluation.scoring.base import AnswerRule, ScoredAnswer, by_category, mean_score

__all__ = ["MMEPairs", "YesNo"]

_PERCEPTION = frozenset(
    {"existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"}
)


class YesNo(AnswerRule):
    """POPE's accuracy: an answer whose first sentence has the word no or not means no, every other one yes."""

    def score(self, prediction: str, answers: Sequence[str]) -> float:
        """1 or 0."""
        return float(_says_yes(prediction) == _is_yes(answers[0]))

    def figures(self, rows: Sequence[ScoredAnswer]) -> dict[str, float]:
        """Precision, recall and F1 of "yes" and the share of "yes"; the same with the accuracy by category."""
        parts = by_category(rows)
        figures = _detection(rows)
        for name, part in parts.items():
            figures |= {f"{figure}, {name}": value for figure, value in _detection(part).items()}
            figures[f"accuracy, {name}"] = mean_score(part)
        if parts:
            figures["F1, mean of categories"] = fmean(_detection(part)["F1"] for part in parts.values())
        return figures


class MMEPairs(AnswerRule):
    """MME: yes or no in the first letters of the answer, everything else is wrong; scores by ability.

    The score of an ability is its accuracy plus its accuracy+ (images of which both questions are answered right), in
    percent: at most 200.
    """

    def score(self, prediction: str, answers: Sequence[str]) -> float:
        """1 or 0."""
        return float(_first_word(prediction) == ("yes" if _is_yes(answers[0]) else "no"))

    def figures(self, rows: Sequence[ScoredAnswer]) -> dict[str, float]:
        """`score, perception` (at most 2,000) and `score, cognition` (at most 800); acc, acc+ and score by ability."""
        figures: dict[str, float] = {}
        sums = {"perception": 0.0, "cognition": 0.0}
        for ability, part in by_category(rows).items():
            images = defaultdict(list)
            for row in part:
                images[row.image].append(row.score)
            accuracy = mean_score(part)
            both = fmean(all(scores) for scores in images.values())
            total = 100 * (accuracy + both)
            figures |= {f"acc, {ability}": accuracy, f"acc+, {ability}": both, f"score, {ability}": total}
            sums["perception" if ability in _PERCEPTION else "cognition"] += total
        return {f"score, {name}": total for name, total in sums.items()} | figures


def _detection(rows: Sequence[ScoredAnswer]) -> dict[str, float]:
    said = [_says_yes(row.prediction) for row in rows]
    true = [_is_yes(row.answers[0]) for row in rows]
    hits = sum(mine and right for mine, right in zip(said, true, strict=True))
    precision, recall = hits / max(sum(said), 1), hits / max(sum(true), 1)
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": precision, "recall": recall, "F1": f1, "yes rate": sum(said) / len(said)}


def _says_yes(prediction: str) -> bool:
    words = re.split(r"[\s,]+", prediction.split(".")[0].strip())
    return not {"no", "not", "No"} & set(words)


def _is_yes(answer: str) -> bool:
    return answer.strip().rstrip(".").lower() == "yes"


def _first_word(prediction: str) -> Literal["yes", "no", "other"]:
    text = prediction.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return "yes" if text == "y" else "no"
    start = text[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"
