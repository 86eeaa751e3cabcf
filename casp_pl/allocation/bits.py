"""Bit allocation: one level for every item so that the summed loss is smallest within a budget of bits.

Losses are `score * distortion(level)`; costs are arbitrary integers, so codebooks and scales can count like codes do.
Exact: dynamic programming over the Pareto front of (cost, loss), pruned by the fractional solution of what is still to
come and by a greedy solution. The closed form beside it is reverse water-filling (Cover and Thomas, Elements of
Information Theory, section 10.3) for the distortion `score * 2**(-2 bits)`.

Legend: S states of the front, L levels of an item.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from casp_pl.allocation.fronts import Relaxation, Step, convex_hull, pareto_front, slope, undominated
from casp_pl.errors import ConfigError

__all__ = ["BitItem", "allocate_bits", "allocate_bits_greedily", "continuous_bits"]

_SLACK = 1e-9  # relative: rounding of the bounds must never cut the optimum away


@dataclass(frozen=True)
class BitItem:
    """One block or linear that gets one level.

    Attributes:
        score: weight of its distortion in the sum, finite and not negative.
        choices: level (bits, or a rank) to its cost (an integer number of bits) and its distortion (not negative).
    """

    score: float
    choices: Mapping[int, tuple[int, float]]

    def __post_init__(self) -> None:
        if not self.choices:
            raise ConfigError("Nothing to allocate: an item has no level to choose from.")
        for number in (self.score, *(distortion for _, distortion in self.choices.values())):
            if not math.isfinite(number) or number < 0:
                raise ConfigError(f"Scores and distortions must be finite and not negative, got {number}.")

    def steps(self) -> list[Step]:
        """Cost and weighted loss of every level."""
        return [Step(cost, self.score * distortion, level) for level, (cost, distortion) in self.choices.items()]


def allocate_bits(items: Sequence[BitItem], budget_bits: int) -> list[int]:
    """The level of every item with the smallest summed loss among all assignments that cost at most `budget_bits`.

    Deterministic; of equally good assignments it returns a cheapest one.

    Args:
        items: what is to get a level.
        budget_bits: the most that all items may cost together.

    Raises:
        ConfigError: even the cheapest levels cost more than the budget.
    """
    fronts = [pareto_front(item.steps()) for item in items]
    _check_budget(fronts, budget_bits)
    hulls = [convex_hull(front) for front in fronts]
    incumbent = sum(step.loss for step in _greedy_steps(hulls, budget_bits)) * (1 + _SLACK)
    cost = torch.zeros(1, dtype=torch.int64)
    loss = torch.zeros(1, dtype=torch.float64)
    trail = []  # per item: the state that every state came from, and the step it took
    for number, front in enumerate(fronts):
        cost = (cost[:, None] + torch.tensor([step.cost for step in front])).flatten()  # (S, L) -> (S L,)
        loss = (loss[:, None] + torch.tensor([step.loss for step in front], dtype=torch.float64)).flatten()
        keep = undominated(cost, loss)
        rest = Relaxation(hulls[number + 1 :])
        keep = keep[cost[keep] + rest.cheapest <= budget_bits]
        keep = keep[loss[keep] + rest.lower_bound(budget_bits - cost[keep]) <= incumbent]
        trail.append((keep // len(front), keep % len(front)))
        cost, loss = cost[keep], loss[keep]
    return _walk_back(fronts, trail, int(loss.argmin()))


def allocate_bits_greedily(items: Sequence[BitItem], budget_bits: int) -> list[int]:
    """From the cheapest levels up, always the step along an item's convex hull that buys most per bit and still fits.

    Optimal where the budget ends at a corner of the hulls, close to it elsewhere.

    Raises:
        ConfigError: even the cheapest levels cost more than the budget.
    """
    hulls = [convex_hull(pareto_front(item.steps())) for item in items]
    _check_budget(hulls, budget_bits)
    return [step.level for step in _greedy_steps(hulls, budget_bits)]


def continuous_bits(scores: Sequence[float], mean: float) -> list[float]:
    """Closed form for items of equal size and distortion `score * 2**(-2 bits)`: the oracle of the integer solution.

    `b_l = mean + 0.5 log2(s_l / geometric_mean(s))`, without limits: values may leave a quantizer's levels.

    Args:
        scores: s, positive.
        mean: bits that the items have on average.
    """
    logs = [math.log2(score) for score in scores]
    centre = sum(logs) / len(logs)
    return [mean + 0.5 * (value - centre) for value in logs]


def _greedy_steps(hulls: Sequence[Sequence[Step]], budget_bits: int) -> list[Step]:
    position = [0] * len(hulls)
    left = budget_bits - sum(hull[0].cost for hull in hulls)
    heap = [(slope(hull[0], hull[1]), number) for number, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(heap)
    while heap:
        _, number = heapq.heappop(heap)
        hull, here = hulls[number], position[number]
        price = hull[here + 1].cost - hull[here].cost
        if price > left:
            continue
        left -= price
        position[number] = here + 1
        if here + 2 < len(hull):
            heapq.heappush(heap, (slope(hull[here + 1], hull[here + 2]), number))
    return [hull[here] for hull, here in zip(hulls, position, strict=True)]


def _check_budget(fronts: Sequence[Sequence[Step]], budget_bits: int) -> None:
    least = sum(front[0].cost for front in fronts)
    if least > budget_bits:
        most = sum(front[-1].cost for front in fronts)
        raise ConfigError(f"A budget of {budget_bits} bits cannot be met: feasible are {least} to {most} bits.")


def _walk_back(fronts: Sequence[Sequence[Step]], trail: Sequence[tuple[Tensor, Tensor]], state: int) -> list[int]:
    levels = []
    for front, (parents, steps) in zip(reversed(fronts), reversed(trail), strict=True):
        levels.append(front[int(steps[state])].level)
        state = int(parents[state])
    return levels[::-1]
