"""The geometry behind the allocation: Pareto fronts of (cost, loss), their convex hulls, and the fractional solution.

Legend: S states.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Relaxation", "Step", "convex_hull", "pareto_front", "slope", "undominated"]


@dataclass(frozen=True)
class Step:
    """One level of one item: what it costs (an integer) and the loss that it leaves."""

    cost: int
    loss: float
    level: int


def pareto_front(steps: Iterable[Step]) -> list[Step]:
    """The steps that no cheaper one beats, by rising cost and falling loss; never empty."""
    front: list[Step] = []
    best = math.inf
    for step in sorted(steps, key=lambda step: (step.cost, step.loss, step.level)):
        if step.loss < best:
            front.append(step)
            best = step.loss
    return front


def convex_hull(front: Sequence[Step]) -> list[Step]:
    """Lower convex hull of a front: slopes are negative and rise along it."""
    hull: list[Step] = []
    for step in front:
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-1], step):
            hull.pop()
        hull.append(step)
    return hull


def slope(before: Step, after: Step) -> float:
    """Change of loss per unit of cost from one step to a dearer one."""
    return (after.loss - before.loss) / (after.cost - before.cost)


def undominated(cost: Tensor, loss: Tensor) -> Tensor:
    """Indices (S',) of the states (S,), (S,) that no other state beats, by rising cost."""
    order = torch.argsort(loss, stable=True)
    order = order[torch.argsort(cost[order], stable=True)]
    minima = loss[order].cummin(0).values
    better = torch.ones(len(order), dtype=torch.bool)
    better[1:] = loss[order][1:] < minima[:-1]
    return order[better]


class Relaxation:
    """Fractional solution of some items: a loss that no assignment within a budget can go below.

    Items may stop anywhere on an edge of their hull, so all edges are taken by falling worth until the budget is spent.
    What remains is added up from its end, from small to large: taken from the sum of all losses instead, bounds near 0
    would be nothing but rounding.

    Attributes:
        cheapest: what the cheapest levels of all items cost together.
    """

    def __init__(self, hulls: Sequence[Sequence[Step]]) -> None:
        edges = [
            (slope(before, after), after.cost - before.cost, before.loss - after.loss)
            for hull in hulls
            for before, after in zip(hull, hull[1:], strict=False)
        ]
        edges.sort()
        self.cheapest = sum(hull[0].cost for hull in hulls)
        self._spent = torch.tensor([0, *(edge[1] for edge in edges)], dtype=torch.float64).cumsum(0)
        self._drops = torch.tensor([edge[2] for edge in edges], dtype=torch.float64)
        least = torch.tensor([sum(hull[-1].loss for hull in hulls)], dtype=torch.float64)
        self._losses = torch.cat([least, self._drops.flip(0)]).cumsum(0).flip(0)

    def lower_bound(self, budgets: Tensor) -> Tensor:
        """Budgets (S,), each at least `cheapest`, to bounds (S,)."""
        if len(self._spent) == 1:
            return self._losses.expand(len(budgets))
        spare = (budgets - self.cheapest).double().clamp(max=float(self._spent[-1]))
        right = torch.searchsorted(self._spent, spare).clamp(min=1)
        untaken = (self._spent[right] - spare) / (self._spent[right] - self._spent[right - 1])
        return self._losses[right] + untaken * self._drops[right - 1]
