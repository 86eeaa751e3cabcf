"""Which questions a report shows."""

from pathlib import Path

from casp_pl.data.sample import Sample, Turn
from casp_pl.pipeline.examples import choose_examples

WORDINGS = ("what shape?", "which color?", "is it red?")


def make(count: int) -> list[Sample]:
    """Three questions on each image, in three wordings."""
    return [
        Sample(id=str(n), turns=(Turn(WORDINGS[n % 3], "yes"),), images=(Path(f"{n // 3}.png"),)) for n in range(count)
    ]


def test_images_differ_and_wordings_vary() -> None:
    samples = make(36)
    chosen = choose_examples(samples, {sample.id: ("yes", "yes") for sample in samples}, 4)
    assert len({sample.image for sample in chosen}) == 4
    assert {sample.turns[0].question for sample in chosen} == set(WORDINGS)
    assert list(chosen) == sorted(chosen, key=samples.index)


def test_a_quarter_shows_where_the_models_differ() -> None:
    samples = make(60)
    answers = {sample.id: ("yes", "no" if int(sample.id) % 10 == 9 else "yes") for sample in samples}
    chosen = choose_examples(samples, answers, 8)
    assert len(chosen) == 8
    assert sum(answers[sample.id][0] != answers[sample.id][1] for sample in chosen) == 2


def test_few_or_unanswered_questions_are_no_problem() -> None:
    samples = make(9)
    assert choose_examples([], {}) == ()
    assert [sample.id for sample in choose_examples(samples, {"4": ("a", "b"), "5": ("a", "b")})] == ["4"]
    assert len(choose_examples(samples, {sample.id: ("a", "b") for sample in samples})) == 3
