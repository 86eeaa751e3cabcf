"""Where bits went, what one more would buy, and what other sizes would cost in predicted error."""

from dataclasses import dataclass

from casp_pl.allocation import (
    CompressionPlan,
    Granularity,
    LevelChange,
    choices_of_plan,
    error_curve,
    predicted_error,
    steps_from,
)
from casp_pl.quantizers import Quantizer

__all__ = ["CurveEntry", "GroupForecast", "forecast_bits"]


@dataclass(frozen=True)
class GroupForecast:
    """The linears that share their bits: a block, or one linear.

    Attributes:
        name: `block 3`, or the linear's full name.
        bits: of their codes.
        ranks: full name to rank of the low-rank products in the same block.
        score: what their distortion counts.
        error_share: share of the predicted error of all groups.
        one_bit_more: bytes and change of the predicted error at the next level; None at the highest.
        one_bit_less: the same at the level below.
    """

    name: str
    bits: int
    ranks: dict[str, int]
    score: float
    error_share: float
    one_bit_more: dict[str, float] | None
    one_bit_less: dict[str, float] | None


@dataclass(frozen=True)
class CurveEntry:
    """A point of the Pareto curve: no allocation of that size has a smaller predicted error.

    Attributes:
        bits_per_weight_total: everything counted, of the compressed linears.
        weights_bytes: of model.safetensors.
        error: predicted, relative to the plan's.
    """

    bits_per_weight_total: float
    weights_bytes: int
    error: float


def forecast_bits(
    plan: CompressionPlan, quantizer: Quantizer, granularity: Granularity, weights_bytes: int
) -> tuple[tuple[GroupForecast, ...], tuple[CurveEntry, ...]]:
    """What every group of linears got, the price of a bit more or less, and the Pareto curve.

    Both are empty where no linear's bits were chosen: all are low-rank products, or the user gave them bits.

    Args:
        plan: rank and bits of every linear.
        quantizer: what is asked for true costs.
        granularity: which linears share their bits.
        weights_bytes: of model.safetensors with this plan.
    """
    choices, levels = choices_of_plan(plan, quantizer, granularity, counts="total")
    if not choices.items:
        return (), ()
    error = predicted_error(choices.items, levels)
    groups = []
    for group, item, level in zip(choices.groups, choices.items, levels, strict=True):
        less, more = steps_from(item, level)
        block = group[0].block
        groups.append(
            GroupForecast(
                name=f"block {block}" if granularity == "block" else group[0].name,
                bits=level,
                ranks={module.name: module.rank for module in plan.of_block(block) if module.rank is not None},
                score=item.score,
                error_share=item.score * item.choices[level][1] / error,
                one_bit_more=_price(more, error),
                one_bit_less=_price(less, error),
            )
        )
    spent = choices.fixed + sum(item.choices[level][0] for item, level in zip(choices.items, levels, strict=True))
    curve = [
        CurveEntry(
            bits_per_weight_total=(choices.fixed + point.cost) / choices.weights,
            weights_bytes=weights_bytes + (choices.fixed + point.cost - spent) // 8,
            error=point.error / error,
        )
        for point in error_curve(choices.items)
    ]
    return tuple(groups), tuple(curve)


def _price(change: LevelChange | None, error: float) -> dict[str, float] | None:
    if change is None:
        return None
    return {"bits": change.level, "bytes": change.cost // 8, "error": change.error / error}
