"""What more or fewer bits would do: the smallest predicted error at every size, and the price of one more bit.

Every point is an exact optimum of `allocate_bits`; the error is the model's, `sum of score * 2**(-2 bits)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from casp_pl.allocation.bits import BitItem, allocate_bits
from casp_pl.errors import ConfigError

__all__ = ["CurvePoint", "LevelChange", "error_curve", "predicted_error", "reallocated", "steps_from"]


@dataclass(frozen=True)
class CurvePoint:
    """An allocation that no other one beats in both: its cost in bits, its predicted error, the level of every item."""

    cost: int
    error: float
    levels: tuple[int, ...]


@dataclass(frozen=True)
class LevelChange:
    """What changes when one item goes to another level: bits and predicted error; both have a sign."""

    level: int
    cost: int
    error: float


def error_curve(items: Sequence[BitItem], points: int = 13) -> list[CurvePoint]:
    """The best allocations at budgets that are evenly spaced from the cheapest to the dearest, each once.

    Args:
        items: what gets levels.
        points: budgets that are tried, at least 2.
    """
    least = sum(min(cost for cost, _ in item.choices.values()) for item in items)
    most = sum(max(cost for cost, _ in item.choices.values()) for item in items)
    budgets = [least + (most - least) * number // (points - 1) for number in range(points)]
    found = {_point(items, allocate_bits(items, budget)) for budget in budgets}
    return sorted(found, key=lambda point: point.cost)


def predicted_error(items: Sequence[BitItem], levels: Sequence[int]) -> float:
    """Sum over the items of their score times the distortion of their level."""
    return sum(item.score * item.choices[level][1] for item, level in zip(items, levels, strict=True))


def steps_from(item: BitItem, level: int) -> tuple[LevelChange | None, LevelChange | None]:
    """To the next lower and the next higher level of an item; None where there is none."""
    lower = max((other for other in item.choices if other < level), default=None)
    higher = min((other for other in item.choices if other > level), default=None)
    return _step(item, level, lower), _step(item, level, higher)


def reallocated(items: Sequence[BitItem], budget_bits: int, number: int, level: int) -> CurvePoint | None:
    """The best allocation within the budget in which one item has a given level; None where nothing is within it."""
    forced = replace(items[number], choices={level: items[number].choices[level]})
    try:
        levels = allocate_bits([*items[:number], forced, *items[number + 1 :]], budget_bits)
    except ConfigError:
        return None
    return _point(items, levels)


def _point(items: Sequence[BitItem], levels: Sequence[int]) -> CurvePoint:
    cost = sum(item.choices[level][0] for item, level in zip(items, levels, strict=True))
    return CurvePoint(cost, predicted_error(items, levels), tuple(levels))


def _step(item: BitItem, level: int, other: int | None) -> LevelChange | None:
    if other is None:
        return None
    (cost, distortion), (new_cost, new_distortion) = item.choices[level], item.choices[other]
    return LevelChange(other, new_cost - cost, item.score * (new_distortion - distortion))
