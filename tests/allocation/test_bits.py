import itertools
import random

import pytest
import torch

from casp_pl.allocation import BitItem, allocate_bits, allocate_bits_greedily, continuous_bits
from casp_pl.allocation.fronts import Relaxation, Step, convex_hull, pareto_front
from casp_pl.errors import ConfigError


def total(items, levels):
    cost = sum(item.choices[level][0] for item, level in zip(items, levels, strict=True))
    loss = sum(item.score * item.choices[level][1] for item, level in zip(items, levels, strict=True))
    return cost, loss


def exhaustive(items, budget):
    every = (total(items, levels) for levels in itertools.product(*(item.choices for item in items)))
    return min(loss for cost, loss in every if cost <= budget)


def random_items(generator, count):
    items = []
    for _ in range(count):
        weights = generator.choice([7, 35, 64, 333])
        overhead = generator.randint(0, 50)
        levels = generator.sample([1, 2, 3, 4, 8], generator.randint(1, 4))
        choices = {level: (weights * level + overhead, 2.0 ** (-2 * level) * generator.random()) for level in levels}
        items.append(BitItem(score=generator.choice([0.0, 1.0, generator.random() * 100]), choices=choices))
    return items


@pytest.mark.parametrize("seed", range(40))
def test_exact_equals_exhaustive_search(seed):
    generator = random.Random(seed)
    items = random_items(generator, 7)
    least = sum(min(cost for cost, _ in item.choices.values()) for item in items)
    most = sum(max(cost for cost, _ in item.choices.values()) for item in items)
    for budget in (least, generator.randint(least, most), generator.randint(least, most), most, 2 * most):
        cost, loss = total(items, allocate_bits(items, budget))
        assert cost <= budget
        assert loss == pytest.approx(exhaustive(items, budget), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("seed", range(40))
def test_exact_equals_exhaustive_search_where_losses_vanish(seed):
    generator = random.Random(seed)
    items = []
    for _ in range(7):
        losses = sorted((generator.choice([0.0, 10.0 ** generator.uniform(-20, 0)]) for _ in range(4)), reverse=True)
        items.append(BitItem(1.0, {rank: (rank * generator.randint(5, 9), loss) for rank, loss in enumerate(losses)}))
    most = sum(max(cost for cost, _ in item.choices.values()) for item in items)
    for budget in (most, most - 1, most - 10, most // 2, most // 3):
        cost, loss = total(items, allocate_bits(items, budget))
        assert cost <= budget
        assert loss == pytest.approx(exhaustive(items, budget), rel=1e-9, abs=0)


@pytest.mark.parametrize("seed", range(20))
def test_greedy_fits_and_stays_close_to_exact(seed):
    generator = random.Random(seed)
    items = [
        BitItem(generator.uniform(0.1, 10), {bits: (bits * size, 2.0 ** (-2 * bits)) for bits in (2, 3, 4)})
        for size in generator.choices([100, 300], k=30)
    ]
    budget = int(2.6 * sum(item.choices[2][0] / 2 for item in items))
    greedy_cost, greedy_loss = total(items, allocate_bits_greedily(items, budget))
    exact_cost, exact_loss = total(items, allocate_bits(items, budget))
    assert greedy_cost <= budget
    assert exact_cost <= budget
    assert exact_loss <= greedy_loss <= 1.05 * exact_loss


def test_fine_levels_approach_the_closed_form():
    scores = [0.5, 1.0, 3.0, 20.0, 0.07]
    fine = 64  # levels of 1/64 bit: cost is counted in 64ths
    items = [
        BitItem(score, {level: (level, 2.0 ** (-2 * level / fine)) for level in range(0, 6 * fine)}) for score in scores
    ]
    mean = 3.0
    levels = allocate_bits(items, int(mean * fine * len(scores)))
    for level, expected in zip(levels, continuous_bits(scores, mean), strict=True):
        assert level / fine == pytest.approx(expected, abs=1 / fine)
    assert sum(continuous_bits(scores, mean)) == pytest.approx(mean * len(scores))


def test_many_items_with_unequal_costs_are_solved_in_seconds():
    generator = random.Random(1)
    items = []
    for _ in range(224):
        size = generator.randint(10**6, 10**8)
        items.append(BitItem(generator.random(), {bits: (bits * size + 77, 2.0 ** (-2 * bits)) for bits in (2, 3, 4)}))
    budget = int(1.2 * sum(item.choices[2][0] for item in items))
    levels = allocate_bits(items, budget)
    cost, loss = total(items, levels)
    assert cost <= budget
    assert levels == allocate_bits(items, budget)
    assert loss <= total(items, allocate_bits_greedily(items, budget))[1]


def test_a_budget_below_the_cheapest_levels_names_the_interval():
    items = [BitItem(1.0, {2: (20, 0.1), 3: (30, 0.01)})] * 3
    for solve in (allocate_bits, allocate_bits_greedily):
        with pytest.raises(ConfigError, match="budget of 59 bits cannot be met: feasible are 60 to 90"):
            solve(items, 59)
        assert solve(items, 60) == [2, 2, 2]


def test_no_items_cost_nothing():
    assert allocate_bits([], 0) == []
    with pytest.raises(ConfigError):
        allocate_bits([], -1)


def test_useless_bits_are_not_spent():
    items = [BitItem(0.0, {2: (20, 0.1), 4: (40, 0.0)}), BitItem(1.0, {2: (20, 0.1), 4: (40, 0.1)})]
    assert allocate_bits(items, 1000) == [2, 2]


@pytest.mark.parametrize("choices", [{}, {2: (1, float("nan"))}, {2: (1, -1.0)}])
def test_items_refuse_what_is_no_distortion(choices):
    with pytest.raises(ConfigError):
        BitItem(1.0, choices)


def test_hull_and_relaxation_of_a_known_front():
    front = pareto_front([Step(0, 10.0, 0), Step(1, 9.5, 1), Step(2, 2.0, 2), Step(2, 3.0, 9), Step(4, 1.0, 4)])
    assert [step.level for step in front] == [0, 1, 2, 4]
    hull = convex_hull(front)
    assert [step.level for step in hull] == [0, 2, 4]
    bounds = Relaxation([hull]).lower_bound(torch.tensor([0, 1, 2, 3, 4, 9]))
    assert bounds.tolist() == [10.0, 6.0, 2.0, 1.5, 1.0, 1.0]
