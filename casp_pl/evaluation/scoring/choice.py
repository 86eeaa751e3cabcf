"""Multiple choice: which letter did the model name?"""

import re
from collections.abc import Sequence

from casp_pl.evaluation.scoring.base import AnswerRule, ScoredAnswer, scores_by_category

__all__ = ["OptionLetter"]

_NAMED = re.compile(r"(?i:the answer is) \(?([A-Z])\b")
_IN_FRONT = re.compile(r"\(?([A-Za-z])(?:[.):,]|\s*$)")


class OptionLetter(AnswerRule):
    """ScienceQA and SEED-Bench: the letter alone, in front ("B. red"), or in "The answer is B."; else it is wrong.

    Another text is wrong even where it repeats an option, as in LLaVA's evaluation.
    """

    def score(self, prediction: str, answers: Sequence[str]) -> float:
        """1 or 0."""
        found = _IN_FRONT.match(prediction.strip()) or _NAMED.search(prediction)
        return float(found is not None and found.group(1).upper() in {answer.strip().upper() for answer in answers})

    def figures(self, rows: Sequence[ScoredAnswer]) -> dict[str, float]:
        """The accuracy of each subject or type of question."""
        return scores_by_category(rows)
