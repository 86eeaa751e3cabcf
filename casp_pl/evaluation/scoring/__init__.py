"""How an answer is scored: the rules of the field, chosen by the recipe's `scoring`."""

from casp_pl.evaluation.scoring.base import AnswerRule, ScoredAnswer
from casp_pl.evaluation.scoring.choice import OptionLetter
from casp_pl.evaluation.scoring.match import ExactMatch, GQAMatch
from casp_pl.evaluation.scoring.vqa_rule import VQARule
from casp_pl.evaluation.scoring.yes_no import MMEPairs, YesNo

__all__ = ["AnswerRule", "ExactMatch", "GQAMatch", "MMEPairs", "OptionLetter", "ScoredAnswer", "VQARule", "YesNo"]
