"""What bits are chosen among: the linears that share a level, what each level costs, and the distortion it leaves.

The distortion of a group of linears at b bits is modelled as `score * 2**(-2 b)`. Source: CASP, arXiv 2503.05936.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from casp_pl.allocation.accounting import BitCosts, ModuleBits, module_bits
from casp_pl.allocation.bits import BitItem
from casp_pl.allocation.plan import CompressionPlan, Counts

__all__ = ["BitChoices", "Granularity", "ModuleShape", "bit_choices", "choices_of_plan", "modules_cost", "whole_bits"]

Granularity = Literal["block", "linear"]


@dataclass(frozen=True)
class ModuleShape:
    """A linear before compression: its full name, the number of its block, and (O, I)."""

    name: str
    block: int
    shape: tuple[int, int]

    @property
    def weights(self) -> int:
        """O I."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class BitChoices:
    """Everything that bits are chosen among.

    Attributes:
        groups: linears that get one level together; low-rank products and those with bits of the user's are in none.
        items: cost (in what the budget counts) and distortion of every level, by group.
        fixed: bits of the linears whose level is not chosen.
        weights: original weights of all linears, low-rank ones among them.
    """

    groups: tuple[tuple[ModuleShape, ...], ...]
    items: tuple[BitItem, ...]
    fixed: int
    weights: int

    def budget_bits(self, budget: float) -> int:
        """What is left for the groups of `budget` bits per original weight."""
        return whole_bits(budget, self.weights) - self.fixed


def bit_choices(
    modules: Sequence[ModuleShape],
    ranks: Mapping[str, int],
    scores: Mapping[str, float],
    quantizer: BitCosts,
    *,
    fixed_bits: Mapping[str, int],
    counts: Counts,
    granularity: Granularity,
) -> BitChoices:
    """The choices for these linears.

    Args:
        modules: every linear to compress, in quantization order.
        ranks: full name to rank of the low-rank products.
        scores: full name to what the distortion of that linear counts.
        quantizer: what is asked for levels and true costs.
        fixed_bits: full name to bits of the linears whose level is not chosen, all low-rank products among them.
        counts: what costs are, `codes` alone or the `total` with codebooks, scales and zeros.
        granularity: the linears of a `block` share their bits, or each `linear` has its own.
    """
    groups = _groups([module for module in modules if module.name not in fixed_bits], granularity)
    costs = (modules_cost(quantizer, [m], fixed_bits[m.name], ranks) for m in modules if m.name in fixed_bits)
    return BitChoices(
        groups=groups,
        items=tuple(_item(group, scores, quantizer, counts) for group in groups),
        fixed=sum(cost.counted(counts) for cost in costs),
        weights=sum(module.weights for module in modules),
    )


def choices_of_plan(
    plan: CompressionPlan, quantizer: BitCosts, granularity: Granularity, *, counts: Counts | None = None
) -> tuple[BitChoices, list[int]]:
    """What a finished plan was chosen among, and the levels that it took, by group.

    Args:
        plan: made by `build_plan` with this quantizer and granularity.
        quantizer: what is asked for levels and true costs.
        granularity: which linears shared their bits.
        counts: what costs are; None for what the plan's budget counted.
    """
    modules = [ModuleShape(module.name, module.block, module.shape) for module in plan.modules]
    ranks = {module.name: module.rank for module in plan.modules if module.rank is not None}
    choices = bit_choices(
        modules,
        ranks,
        {module.name: module.score for module in plan.modules},
        quantizer,
        fixed_bits={module.name: module.bits for module in plan.modules if module.rank is not None or module.pinned},
        counts=plan.counts if counts is None else counts,
        granularity=granularity,
    )
    bits = {module.name: module.bits for module in plan.modules}
    return choices, [bits[group[0].name] for group in choices.groups]


def modules_cost(
    quantizer: BitCosts, modules: Iterable[ModuleShape], bits: int, ranks: Mapping[str, int] | None = None
) -> ModuleBits:
    """What these linears cost together at `bits`, as low-rank products where they have a rank."""
    parts = (
        module_bits(quantizer.for_module(m.name), m.shape, bits=bits, rank=(ranks or {}).get(m.name)) for m in modules
    )
    return sum(parts, start=ModuleBits(0, 0))


def whole_bits(budget: float, weights: int) -> int:
    """Whole bits in the budget; the rounding of `budget * weights` does not cost one."""
    return math.floor(budget * weights + 1e-6)


def _groups(modules: Sequence[ModuleShape], granularity: Granularity) -> tuple[tuple[ModuleShape, ...], ...]:
    if granularity == "linear":
        return tuple((module,) for module in modules)
    blocks = sorted({module.block for module in modules})
    return tuple(tuple(module for module in modules if module.block == block) for block in blocks)


def _item(group: Sequence[ModuleShape], scores: Mapping[str, float], quantizer: BitCosts, counts: Counts) -> BitItem:
    costs = {bits: modules_cost(quantizer, group, bits).counted(counts) for bits in quantizer.levels}
    choices = {bits: (cost, 2.0 ** (-2 * bits)) for bits, cost in costs.items()}
    return BitItem(score=sum(scores[module.name] for module in group), choices=choices)
