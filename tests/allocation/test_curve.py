"""The curve and its prices against every assignment there is."""

import itertools

import pytest

from casp_pl.allocation import BitItem, error_curve, predicted_error, reallocated, steps_from

ITEMS = [
    BitItem(score=score, choices={bits: (bits * size + 7, 2.0 ** (-2 * bits)) for bits in levels})
    for score, size, levels in [(0.9, 100, (2, 3, 4)), (0.05, 60, (2, 3)), (3.0, 111, (2, 4)), (0.4, 100, (2, 3, 8))]
]


def assignments():
    for levels in itertools.product(*(item.choices for item in ITEMS)):
        cost = sum(item.choices[level][0] for item, level in zip(ITEMS, levels, strict=True))
        yield cost, predicted_error(ITEMS, levels), levels


def test_every_point_is_the_best_of_its_size():
    curve = error_curve(ITEMS, points=40)
    assert len(curve) > 10
    for point in curve:
        best = min(error for cost, error, _ in assignments() if cost <= point.cost)
        assert point.error == pytest.approx(best)
        cost = sum(item.choices[level][0] for item, level in zip(ITEMS, point.levels, strict=True))
        assert cost == point.cost
    assert [point.cost for point in curve] == sorted({point.cost for point in curve})
    assert all(later.error < earlier.error for earlier, later in itertools.pairwise(curve)), "a front, not a list"


def test_curve_spans_everything():
    curve = error_curve(ITEMS)
    assert curve[0].cost == min(cost for cost, _, _ in assignments())
    assert curve[-1].error == pytest.approx(min(error for _, error, _ in assignments()))


def test_a_step_is_the_difference_of_two_allocations():
    less, more = steps_from(ITEMS[2], 4)
    assert more is None
    assert less is not None
    assert (less.level, less.cost) == (2, -2 * 111)
    assert less.error == pytest.approx(3.0 * (2.0**-4 - 2.0**-8))


@pytest.mark.parametrize(("number", "level"), [(0, 2), (1, 3), (3, 3), (3, 8)])
def test_a_forced_level_is_paid_for_in_the_best_way(number, level):
    budget = 1110
    best = min(
        (error for cost, error, levels in assignments() if cost <= budget and levels[number] == level), default=None
    )
    found = reallocated(ITEMS, budget, number, level)
    if best is None:
        assert found is None
    else:
        assert found is not None
        assert found.levels[number] == level
        assert found.error == pytest.approx(best)
