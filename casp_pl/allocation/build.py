"""Make a compression plan: ranks and scores in, bits under a budget out.

Budget: the bits of all compressed linears <= budget * their original weights. Low-rank factors have fixed bits, and so
have linears that the user gives bits; every other linear gets the bits of its block (or its own), chosen exactly. The
distortion of a block at b bits is modelled as `score * 2**(-2 b)`. Source: CASP, arXiv 2503.05936.
"""

import math
from collections.abc import Mapping, Sequence

from casp_pl.allocation.accounting import BitCosts, ModuleBits
from casp_pl.allocation.bits import BitItem, allocate_bits
from casp_pl.allocation.choices import BitChoices, Granularity, ModuleShape, bit_choices, modules_cost, whole_bits
from casp_pl.allocation.overrides import override_bits
from casp_pl.allocation.plan import CompressionPlan, Counts, ModulePlan
from casp_pl.errors import ConfigError

__all__ = ["build_plan"]


def build_plan(
    *,
    model: str,
    modules: Sequence[ModuleShape],
    ranks: Mapping[str, int | None],
    scores: Sequence[float] | Mapping[str, float],
    quantizer: BitCosts,
    factor_bits: int = 3,
    budget: float = 2.0,
    counts: Counts = "codes",
    granularity: Granularity = "block",
    overrides: Mapping[str, int] | None = None,
) -> CompressionPlan:
    """The plan with the smallest modelled distortion within the budget.

    Args:
        model: name of the model, for the reader.
        modules: every linear to compress, in quantization order.
        ranks: full name to rank for the low-rank products; a name that is absent or None stays one matrix.
        scores: one number a block, in the order of the block numbers that occur, or full name to number. A block's
            score is the sum of its linears'; where only the block's is given, its linears share it by their weights.
        quantizer: what is asked for levels and true costs.
        factor_bits: bits of the low-rank factors.
        budget: bits per original weight of the compressed linears.
        counts: what the budget counts, `codes` alone or the `total` with codebooks, scales and zeros.
        granularity: the linears of a `block` share their bits, or each `linear` has its own.
        overrides: part of a name (whole words between dots) to the bits of all linears with it; see `override_bits`.

    Raises:
        ConfigError: the budget cannot be met (the message has the feasible interval), the quantizer cannot do
            `factor_bits` or an override, one matches nothing, or ranks, scores and modules do not fit together.
    """
    low_rank = {name: rank for name, rank in ranks.items() if rank is not None}
    _check_arguments(modules, ranks, quantizer, factor_bits if low_rank else None)
    by_linear = _scores_by_linear(modules, scores)
    pinned = override_bits([module.name for module in modules], overrides or {}, quantizer)
    fixed_bits = dict.fromkeys(low_rank, factor_bits) | {name: bits for name, (bits, _) in pinned.items()}
    choices = bit_choices(
        modules, low_rank, by_linear, quantizer, fixed_bits=fixed_bits, counts=counts, granularity=granularity
    )
    _check_budget(choices, budget, counts, quantizer.levels)
    chosen = allocate_bits(choices.items, choices.budget_bits(budget))
    decisions = _decisions(choices.groups, choices.items, chosen)
    decisions |= _fixed_decisions(modules, low_rank, pinned, factor_bits)
    cost = sum(
        (modules_cost(quantizer, [module], decisions[module.name][0], low_rank) for module in modules),
        start=ModuleBits(0, 0),
    )
    return CompressionPlan(
        model=model,
        modules=tuple(
            _entry(module, quantizer.name, decisions, low_rank, by_linear, module.name in pinned) for module in modules
        ),
        budget=budget,
        counts=counts,
        bits_per_weight_codes=cost.codes / choices.weights,
        bits_per_weight_total=cost.total / choices.weights,
    )


def _check_arguments(
    modules: Sequence[ModuleShape], ranks: Mapping[str, int | None], quantizer: BitCosts, factor_bits: int | None
) -> None:
    if not modules:
        raise ConfigError("There is no linear to compress.")
    unknown = sorted(set(ranks) - {module.name for module in modules})
    if unknown:
        raise ConfigError(f"ranks: no module is called '{unknown[0]}'.")
    if factor_bits is not None and factor_bits not in quantizer.levels:
        levels = _listed(quantizer.levels)
        raise ConfigError(f"factor_bits: {quantizer.name} cannot do {factor_bits} bits, only {levels}.")


def _scores_by_linear(
    modules: Sequence[ModuleShape], scores: Sequence[float] | Mapping[str, float]
) -> dict[str, float]:
    if isinstance(scores, Mapping):
        missing = [module.name for module in modules if module.name not in scores]
        if missing:
            raise ConfigError(f"scores: there is none for {missing[0]}.")
        return {module.name: float(scores[module.name]) for module in modules}
    blocks = sorted({module.block for module in modules})
    if len(scores) != len(blocks):
        raise ConfigError(f"scores: got {len(scores)} for {len(blocks)} blocks; give one for each.")
    weights = {block: sum(module.weights for module in modules if module.block == block) for block in blocks}
    by_block = dict(zip(blocks, scores, strict=True))
    return {module.name: by_block[module.block] * module.weights / weights[module.block] for module in modules}


def _check_budget(choices: BitChoices, budget: float, counts: Counts, levels: Sequence[int]) -> None:
    if not (math.isfinite(budget) and budget > 0):
        raise ConfigError(f"budget: {budget} is not a positive number of bits per weight.")
    weights, items = choices.weights, choices.items
    least = choices.fixed + sum(min(cost for cost, _ in item.choices.values()) for item in items)
    most = choices.fixed + sum(max(cost for cost, _ in item.choices.values()) for item in items)
    low, high = (math.ceil(bits / weights * 1e4) / 1e4 for bits in (least, most))
    if whole_bits(budget, weights) < least or budget > max(high, *levels):
        raise ConfigError(
            f"budget: {budget} bits per weight ({counts}) cannot be met with levels {_listed(levels)}.\n"
            f"Feasible are {low} to {high} bits per weight."
        )


def _decisions(
    groups: Sequence[Sequence[ModuleShape]], items: Sequence[BitItem], chosen: Sequence[int]
) -> dict[str, tuple[int, str]]:
    """Name to bits and the reason for them."""
    order = sorted(range(len(items)), key=lambda number: -items[number].score)
    places = {number: place for place, number in enumerate(order, start=1)}
    decisions = {}
    for number, (group, item, bits) in enumerate(zip(groups, items, chosen, strict=True)):
        subject, by = "it", "score"
        if len(group) > 1:  # low-rank factors have bits of their own
            subject, by = f"block {group[0].block}", f"the score of the {len(group)} linears that bits are chosen for"
        why = (
            f"{bits} bits because {subject} has place {places[number]} of {len(items)} by {by} ({item.score:.3g}), "
            f"and the budget allows {bits} bits for {chosen.count(bits)} of these places."
        )
        decisions.update({module.name: (bits, why) for module in group})
    return decisions


def _fixed_decisions(
    modules: Sequence[ModuleShape],
    low_rank: Mapping[str, int],
    pinned: Mapping[str, tuple[int, str]],
    factor_bits: int,
) -> dict[str, tuple[int, str]]:
    """The same of the linears whose bits are not chosen."""
    decisions = {}
    for module in modules:
        bits, pattern = pinned.get(module.name, (factor_bits, None))
        if module.name in low_rank:
            decisions[module.name] = (bits, _low_rank_reason(module, low_rank[module.name], bits, pattern))
        elif pattern is not None:
            decisions[module.name] = (bits, f"{bits} bits because {_given(pattern)}.")
    return decisions


def _low_rank_reason(module: ModuleShape, rank: int, bits: int, pattern: str | None) -> str:
    kept = 100 * rank * sum(module.shape) / module.weights
    why = "" if pattern is None else f" because {_given(pattern)}"
    return f"rank {rank} of {min(module.shape)} keeps {kept:.1f} % of its weights, its factors have {bits} bits{why}."


def _given(pattern: str) -> str:
    return f"bits.overrides gives them to '{pattern}'"


def _entry(
    module: ModuleShape,
    quantizer: str,
    decisions: Mapping[str, tuple[int, str]],
    ranks: Mapping[str, int],
    scores: Mapping[str, float],
    pinned: bool,
) -> ModulePlan:
    bits, why = decisions[module.name]
    return ModulePlan(
        name=module.name,
        block=module.block,
        shape=module.shape,
        quantizer=quantizer,
        bits=bits,
        rank=ranks.get(module.name),
        factor_bits=bits if module.name in ranks else None,
        score=scores[module.name],
        why=why,
        pinned=pinned,
    )


def _listed(levels: Sequence[int]) -> str:
    return ", ".join(str(level) for level in levels)
