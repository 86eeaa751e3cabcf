"""Which questions a report shows: different images and wordings, and some on which the models differ."""

from collections.abc import Iterable, Mapping, Sequence

from casp_pl.data.sample import Sample

__all__ = ["choose_examples"]


def choose_examples(
    samples: Sequence[Sample], answers: Mapping[str, tuple[str, str]], count: int = 8
) -> tuple[Sample, ...]:
    """At most `count` samples of as many images, in their order.

    Up to a quarter are questions that the two models answer differently, which is more than their share once a model is
    good; the rest are answered alike, and no wording comes twice while there are others.

    Args:
        samples: of the evaluation, one question each.
        answers: sample id to the answers of original and compressed model; others are not shown.
        count: how many.
    """
    known = [sample for sample in samples if sample.id in answers]
    differing = [sample for sample in known if answers[sample.id][0] != answers[sample.id][1]]
    alike = [sample for sample in known if answers[sample.id][0] == answers[sample.id][1]]
    chosen: list[Sample] = []
    _extend(chosen, differing, count // 4)
    _extend(chosen, _each_wording_once(alike), count)
    _extend(chosen, alike, count)
    _extend(chosen, differing, count)
    ids = {sample.id for sample in chosen}
    return tuple(sample for sample in known if sample.id in ids)


def _extend(chosen: list[Sample], more: Iterable[Sample], count: int) -> None:
    """Append samples of images that are not there yet, up to `count` in all."""
    for sample in more:
        if len(chosen) < count and all(sample.image != other.image for other in chosen):
            chosen.append(sample)


def _each_wording_once(samples: Sequence[Sample]) -> list[Sample]:
    """The first sample of every image and wording that are both new."""
    images, wordings, first = set(), set(), []
    for sample in samples:
        wording = sample.turns[0].question
        if wording not in wordings and sample.image not in images:
            images.add(sample.image)
            wordings.add(wording)
            first.append(sample)
    return first
