"""VQA accuracy (Antol et al., ICCV 2015; the same in VQAv2 and TextVQA): how many of ten people gave this answer?

Three are enough: min(1, number / 3), averaged over the ten sets of nine people. With m of n people agreeing

    accuracy = (m min(1, (m - 1) / 3) + (n - m) min(1, m / 3)) / n

Both sides are normalised first: punctuation, numbers in words, articles, contractions.
"""

import re
from collections.abc import Sequence

from casp_pl.errors import InputError
from casp_pl.evaluation.scoring.base import AnswerRule, ScoredAnswer, scores_by_category

__all__ = ["VQARule", "normalise_vqa_answer"]

_ENOUGH = 3
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBERS)}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_FULL_STOP = re.compile(r"\.(?!\d)")
# Written with all their apostrophes; each is recognised with any one of them, or the only one, missing.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
    'twas 'ow's'at y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


class VQARule(AnswerRule):
    """TextVQA and VQAv2: agreement with the answers of ten people, see above."""

    def score(self, prediction: str, answers: Sequence[str]) -> float:
        """The agreement, 0 .. 1.

        Raises:
            InputError: there are fewer than four answers: the rule is about the agreement of several people.
        """
        people = len(answers)
        if people <= _ENOUGH:
            raise InputError(
                f"scoring VQARule: a question has {people} answers, the rule is for ten people's\n"
                "Set scoring.class_path to casp_pl.evaluation.scoring.ExactMatch for single answers."
            )
        said = normalise_vqa_answer(prediction)
        agree = sum(normalise_vqa_answer(answer) == said for answer in answers)
        among_others = agree * min(1.0, (agree - 1) / _ENOUGH) + (people - agree) * min(1.0, agree / _ENOUGH)
        return among_others / people

    def figures(self, rows: Sequence[ScoredAnswer]) -> dict[str, float]:
        """The accuracy of each type of answer."""
        return scores_by_category(rows)


def normalise_vqa_answer(text: str) -> str:
    """What the published evaluation compares: "Two dogs." becomes "2 dogs"."""
    lower = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    plain = _without_punctuation(" ".join(lower.split()))
    words = [_DIGITS.get(word, word) for word in plain.split()]
    return " ".join(_CONTRACTED.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """A mark beside a space disappears, one between letters becomes a space; full stops stay before digits."""
    number = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or number else " ")
    return _FULL_STOP.sub("", out)


def _spellings(word: str) -> list[str]:
    places = [place for place, character in enumerate(word) if character == "'"]
    return [word[:place] + word[place + 1 :] for place in places]


_CONTRACTED = {spelling: word for word in _CONTRACTIONS.split() for spelling in _spellings(word)}
