"""Every rule against the published formula, written out, or against the harness that has it."""

import statistics

import pytest
import torch

from casp_pl.errors import InputError
from casp_pl.evaluation.scoring import ExactMatch, GQAMatch, MMEPairs, OptionLetter, ScoredAnswer, VQARule, YesNo
from casp_pl.evaluation.scoring.vqa_rule import normalise_vqa_answer


def answered(rule, *rows):
    """(prediction, answer, category, image) -> scored answers."""
    return [
        ScoredAnswer(text, (answer,), rule.score(text, (answer,)), category, image)
        for text, answer, category, image in rows
    ]


def test_exact_match_takes_any_of_the_answers():
    rule = ExactMatch()
    assert [rule.score(text, ("red", "A circle")) for text in ("Circle.", "red", "blue")] == [1, 1, 0]
    rows = answered(rule, ("a", "b", "x", 0), ("b", "b", "x", 0), ("c", "c", "y", 1), ("c", "c", "", 1))
    assert rule.figures(rows) == {"accuracy, x": 0.5, "accuracy, y": 1.0}
    assert rule.figures(rows[3:]) == {}


def test_vqa_rule_is_the_mean_over_sets_of_nine_people():
    generator = torch.Generator().manual_seed(0)
    for people in (10, 10, 10, 5):
        answers = [f"word{number}" for number in torch.randint(4, (people,), generator=generator).tolist()]
        for said in ("word0", "word1", "word9"):
            others = [answers[:number] + answers[number + 1 :] for number in range(people)]
            expected = statistics.mean(min(1.0, rest.count(said) / 3) for rest in others)
            assert VQARule().score(said, answers) == pytest.approx(expected)
    # the published table: 0, 0.3, 0.6, 0.9, 1 for 0 to 4 of ten people
    scores = [VQARule().score("yes", ["yes"] * agree + ["no"] * (10 - agree)) for agree in range(5)]
    assert scores == pytest.approx([0, 0.3, 0.6, 0.9, 1])
    with pytest.raises(InputError, match="3 answers"):
        VQARule().score("yes", ["yes"] * 3)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Two dogs.", "2 dogs"),
        ("The  man", "man"),
        ("dont know", "don't know"),
        ("1,000", "1000"),
        ("3.5 m", "3.5 m"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("None", "0"),
        ("what?", "what"),
    ],
)
def test_vqa_answers_are_normalised(text, normal):
    assert normalise_vqa_answer(text) == normal


def test_vqa_rule_is_that_of_lmms_eval():
    pytest.importorskip("loguru", reason="lmms-eval is not installed: pip install 'casp_pl[eval]'")
    metric = pytest.importorskip(
        "lmms_eval.tasks._task_utils.vqa_eval_metric",
        reason="lmms-eval is not installed: pip install 'casp_pl[eval]'",
        exc_type=ImportError,
    )
    theirs = metric.EvalAIAnswerProcessor()
    texts = [
        *theirs.CONTRACTIONS,
        *theirs.CONTRACTIONS.values(),
        *theirs.NUMBER_MAP,
        "It's 1,000.5 (about)!",
        "a\nb\tc",
    ]
    texts += ["U.S.A.", "10:30 am", "a-b", "a - b", "x_y", "'the' one?", "$5.99", "no, it isnt", 'say "hi"', ""]
    differ = [text for text in texts if normalise_vqa_answer(text) != theirs(text)]
    assert differ == ["somebody'd"]  # which their table turns into somebodyd: its key and value are swapped


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("B", True), ("b", True), ("B.", True), (" (B) red", True), ("B. red", True), ("The answer is B.", True),
        ("the answer is (B)", True), ("A", False), ("red", False), ("Blue", False), ("", False), ("A or B", False),
        ("The answer is A.", False),
    ],
)  # fmt: skip
def test_option_letters(text, right):
    assert OptionLetter().score(text, ("B",)) == right


def test_gqa_is_case_and_full_stops():
    scores = [GQAMatch().score(text, ("traffic light",)) for text in ("Traffic light.", "the traffic light", "light")]
    assert scores == [1, 0, 0]


def test_yes_no_counts_the_confusion():
    rule = YesNo()
    truth = ["yes"] * 4 + ["no"] * 4
    said = ["Yes", "yes, there is", "No", "There is not a dog. Yes", "no", "No, there is no dog.", "Yes.", "maybe"]
    rows = answered(rule, *((text, answer, "popular", 0) for text, answer in zip(said, truth, strict=True)))
    assert [row.score for row in rows] == [1, 1, 0, 0, 1, 1, 0, 0]
    figures = rule.figures(rows)
    assert figures["precision"] == pytest.approx(2 / 4)
    assert figures["recall"] == pytest.approx(2 / 4)
    assert figures["F1"] == pytest.approx(0.5)
    assert figures["yes rate"] == pytest.approx(4 / 8)
    assert figures["accuracy, popular"] == 0.5
    assert figures["F1, mean of categories"] == figures["F1, popular"] == figures["F1"]
    never = rule.figures(answered(rule, ("no", "yes", "", 0), ("no", "no", "", 0)))
    assert (never["precision"], never["F1"], never["yes rate"]) == (0, 0, 0)


def test_mme_counts_images_with_both_answers_right():
    rule = MMEPairs()
    rows = answered(
        rule,
        ("Yes", "Yes", "count", 0), ("no", "No", "count", 0),
        ("Yes", "Yes", "count", 1), ("Yes", "No", "count", 1),
        ("Sure.", "Yes", "OCR", 2), ("No.", "No", "OCR", 2),
        ("yes", "Yes", "code_reasoning", 3), ("n", "No", "code_reasoning", 3),
    )  # fmt: skip
    figures = rule.figures(rows)
    assert (figures["acc, count"], figures["acc+, count"], figures["score, count"]) == (0.75, 0.5, 125)
    assert (figures["acc, OCR"], figures["acc+, OCR"]) == (0.5, 0)
    assert figures["score, perception"] == 125 + 50
    assert figures["score, cognition"] == 200
