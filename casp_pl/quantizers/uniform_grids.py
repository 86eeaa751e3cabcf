"""Grids of uniform codes: a scale and a zero point for every group of a row.

    point(c) = (c - zero) * scale,  c = 0 .. 2**bits - 1

Zero is always on the grid, and scales are values that float16 holds exactly. Letters: O out, G groups, D group size.
"""

import logging

import torch
from torch import Tensor

from casp_pl.errors import NumericsError

__all__ = ["check_scales", "nearest_codes", "range_grid", "searched_grid"]

_logger = logging.getLogger(__name__)
_SMALLEST_SCALE = 2.0**-24  # the smallest positive float16, what a group of zeros gets
_LARGEST_SCALE = torch.finfo(torch.float16).max
_SHRINKS = tuple(1 - 0.6 * i / 11 for i in range(12))  # from the whole range to 0.4 of it
_ZERO_SHIFTS = (0, -1, 1)


def range_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The grid from `low` to `high`, which are widened to include zero; its scale is kept in float16's range.

    Args:
        low: any shape, float32.
        high: the same shape.
        bits: the grid has 2**bits points.

    Returns:
        zeros and scales of that shape, float32.
    """
    top = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = ((high - low) / top).clamp(_SMALLEST_SCALE, _LARGEST_SCALE)
    scales = scales.to(torch.float16).to(low.dtype)
    return (-low / scales).round().clamp(0, top), scales


def check_scales(weight: Tensor, scales: Tensor, column_groups: Tensor, live: Tensor | None = None) -> None:
    """Warns of groups whose scale would leave float16's range, and so lies at its end.

    Args:
        weight: W (O, I); a group of zeros fits any scale.
        scales: (O, G), as `range_grid` and `searched_grid` make them.
        column_groups: the group of every column (I,).
        live: which columns the groups were fitted to (I,); None for all.

    Raises:
        NumericsError: no group of the weight fits, so that nothing of it would be left.
    """
    low, high = scales <= _SMALLEST_SCALE, scales >= _LARGEST_SCALE
    if not bool((low | high).any()):
        return
    sizes = weight.abs().to(scales.dtype) if live is None else weight.abs().to(scales.dtype) * live
    largest = torch.zeros_like(scales).scatter_reduce_(1, column_groups.expand(sizes.shape), sizes, "amax")
    held, below, above = (int(mask.sum()) for mask in (largest > 0, low & (largest > 0), high & (largest > 0)))
    what = f"groups of the weight {tuple(weight.shape)} need scales outside float16, {_SMALLEST_SCALE:.1e} to"
    what = f"{what} {_LARGEST_SCALE:.0f}: its largest value is {float(largest.max()):.1e}"
    if 0 < held == below + above:
        raise NumericsError(f"all {held} {what}.\nLook at the checkpoint: nothing of this weight would be left.")
    if below + above:
        _logger.warning(
            "%d of %d %s; those of %d small groups become 0 or coarse, those of %d large ones are cut off",
            below + above, scales.numel(), what, below, above,
        )  # fmt: skip


def nearest_codes(weight: Tensor, zeros: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest point of every weight; all of one shape, or shapes that broadcast. Float codes."""
    return (weight / scales).round().add(zeros).clamp(0, 2**bits - 1)


def searched_grid(weight: Tensor, importance: Tensor, bits: int, *, search: bool) -> tuple[Tensor, Tensor]:
    """The grid of every group and row: its range, or a smaller one that lowers the weighted square error.

    A few outliers cost most of a coarse grid's points, so it pays to clip them (GPTQ's code searches likewise).

    Args:
        weight: (..., D, O), groups of columns of W^T.
        importance: (..., D), at least 0: what a square error in a column costs. Columns of importance 0 do not shape
            the grid, unless the whole group is like that.
        bits: the grid has 2**bits points.
        search: False takes the range as it is.

    Returns:
        zeros and scales (..., O).
    """
    silent = (importance <= 0).all(dim=-1, keepdim=True)
    importance = torch.where(silent, torch.ones_like(importance), importance)
    seen = weight * (importance > 0).unsqueeze(-1)
    low, high = seen.amin(dim=-2), seen.amax(dim=-2)
    if not search:
        return range_grid(low, high, bits)
    return _shrunk_grid(seen, importance, low, high, bits)


def _shrunk_grid(weight: Tensor, importance: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The best of all shrunk ranges, each with its own zero point and the two beside it."""
    top = 2**bits - 1
    best_zeros, best_scales = range_grid(low, high, bits)
    least = torch.full_like(low, float("inf"))
    for shrink in _SHRINKS:
        zeros_at_range, scales = range_grid(shrink * low, shrink * high, bits)
        steps = (weight / scales.unsqueeze(-2)).round_()
        for shift in _ZERO_SHIFTS:
            zeros = (zeros_at_range + shift).clamp_(0, top)
            clipped = steps.clamp(-zeros.unsqueeze(-2), (top - zeros).unsqueeze(-2))
            error = clipped.mul_(scales.unsqueeze(-2)).sub_(weight).square_()
            cost = (importance.unsqueeze(-2) @ error).squeeze(-2)
            better = cost < least
            least = torch.where(better, cost, least)
            best_zeros, best_scales = torch.where(better, zeros, best_zeros), torch.where(better, scales, best_scales)
    return best_zeros, best_scales
