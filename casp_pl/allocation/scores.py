"""Importance scores: how much the distortion of a block (or linear) counts when bits are given out.

Every function returns positive floats; only their ratios matter to the allocation.
"""

import math
from collections.abc import Mapping, Sequence

from casp_pl.errors import ConfigError, NumericsError

__all__ = ["block_influence_scores", "explicit_scores", "first_last_scores", "proxy_loss_scores", "sensitivity_scores"]

_FLOOR = 1e-12  # keeps a block that changes nothing in the game, behind every other block


def block_influence_scores(influence: Sequence[float]) -> list[float]:
    """Block influence `1 - mean_t cos(x_t, y_t)` of each block's input and output as its score.

    Source: ShortGPT, arXiv 2403.03853, section 3.

    Args:
        influence: one value in [0, 2] a block.

    Raises:
        NumericsError: a value is not finite.
    """
    return _positive(influence, "block influence")


def proxy_loss_scores(losses: Sequence[float]) -> list[float]:
    """The proxy loss that a quick rounding of each block (or linear) leaves, all measured at the same bits.

    At b bits the loss is about `score * 2**(-2 b)`, so losses at one b are scores up to a common factor.

    Args:
        losses: absolute proxy losses, tr((W - Q) H (W - Q)^T).

    Raises:
        NumericsError: a value is not finite.
    """
    return _positive(losses, "proxy loss")


def sensitivity_scores(sensitivities: Mapping[str, float]) -> dict[str, float]:
    """By linear: the KL divergence that rounding it causes, over 2^(-2 b) at b bits.

    Args:
        sensitivities: full name of a linear to nats.

    Raises:
        NumericsError: a value is not finite.
    """
    values = _positive(list(sensitivities.values()), "sensitivity")
    return dict(zip(sensitivities, values, strict=True))


def first_last_scores(blocks: int) -> list[float]:
    """The first block first, then the last, then the second, the third ...: 1, 1/2, 1/3 ...

    With two levels of bits it gives the high one to the first blocks and to the last, as the CASP authors' lists do.
    """
    order = [0, blocks - 1, *range(1, blocks - 1)] if blocks > 1 else list(range(blocks))
    scores = [0.0] * blocks
    for position, block in enumerate(order):
        scores[block] = 1.0 / (1 + position)
    return scores


def explicit_scores(values: Sequence[float], count: int) -> list[float]:
    """Scores that the user wrote down.

    Args:
        values: one positive number for each block (or linear).
        count: how many blocks (or linears) there are.

    Raises:
        ConfigError: another number of values, or a value that is not a positive finite number.
    """
    if len(values) != count:
        raise ConfigError(f"scores: got {len(values)} values for {count} blocks; give one for each.")
    wrong = [value for value in values if not math.isfinite(value) or value <= 0]
    if wrong:
        raise ConfigError(f"scores: {wrong[0]} is not a positive number.")
    return [float(value) for value in values]


def _positive(values: Sequence[float], what: str) -> list[float]:
    broken = [index for index, value in enumerate(values) if not math.isfinite(value)]
    if broken:
        raise NumericsError(f"The {what} of entry {broken[0]} is {values[broken[0]]}; it cannot be a score.")
    return [max(float(value), _FLOOR) for value in values]
