"""Uniform codes by error feedback: GPTQ (arXiv 2210.17323) as one pure function.

With H the damped second moment and H^-1 = U^T U, U upper triangular, columns are rounded from left to right, and what
rounding column i did wrong is passed on to all later columns j:

    W_j <- W_j - (W_i - Q_i) U_ij / U_ii                                      (section 3.3, step 3)

H = R R^T with R upper triangular gives U = R^-1, and R_ii^2 is what an error in column i still costs after the later
columns have done their best. So one Cholesky and one triangular solve do, and H itself is never inverted.

The passing on is lazy. A column needs it only when its turn comes, so it comes in large products: once for a span of
columns, again for a group inside it, again for a block inside that, and only inside a block column by column (the
paper's lazy batches, on more than one level). The result does not depend on the cuts. Everything is transposed,
(I, O), so that a column of all rows is contiguous.

Letters: O out, I in, G groups a row, D group size.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from casp_pl.linalg.cholesky import safe_cholesky
from casp_pl.linalg.triangular import invert_lower_
from casp_pl.quantizers.uniform_grids import nearest_codes, searched_grid

__all__ = [
    "ColumnOrder",
    "OrderedFeedback",
    "UniformCodes",
    "column_order",
    "error_feedback",
    "gptq_codes",
    "live_columns",
    "ordered_feedback",
]

ColumnOrder = Literal["none", "activation", "group_aware"]

_SPAN = 128
_BLOCK = 32
_STRIP = 512  # rows that are copied at once


class UniformCodes(NamedTuple):
    """Codes (O, I) and zeros (O, G) uint8, scales (O, G), the group of every column (I,) int64."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    column_groups: Tensor


class OrderedFeedback(NamedTuple):
    """What of GPTQ depends on the second moment alone.

    Attributes:
        columns: the columns in the order in which they are rounded (I,).
        groups: the group of every column, in that order (I,).
        feedback: of `error_feedback` (I, I).
        importance: what an error in a column costs (I,), in that order; 0 where the input is dead.
    """

    columns: Tensor
    groups: Tensor
    feedback: Tensor
    importance: Tensor


def ordered_feedback(
    second_moment: Tensor,
    group_size: int,
    order: ColumnOrder,
    static_groups: bool,
    damping: float,
    dtype: torch.dtype = torch.float32,
) -> OrderedFeedback:
    """Order and error feedback of all weights that read inputs with this second moment H (I, I).

    Args:
        second_moment: H (I, I).
        group_size: D.
        order: in which columns are rounded, see `column_order`.
        static_groups: whether groups are runs of the original columns; else, with the order `activation`, a group is
            the next D columns.
        damping: added to the diagonal of H, relative to its mean.
        dtype: of the results; the factorisation is float64.
    """
    diagonal = second_moment.diagonal()
    columns = column_order(diagonal, group_size, order)
    runs = torch.arange(len(columns), device=columns.device) // group_size
    groups = runs if order == "activation" and not static_groups else runs[columns]
    feedback, costs = error_feedback(second_moment[columns][:, columns], damping, dtype)
    importance = torch.where(diagonal[columns] > 0, costs, 0)
    return OrderedFeedback(columns, groups, feedback, importance)


def gptq_codes(
    weight: Tensor, ordered: OrderedFeedback, *, bits: int, group_size: int, static_groups: bool, scale_search: bool
) -> UniformCodes:
    """GPTQ of one weight; deterministic. Weights of dead columns become 0 and move no grid.

    Args:
        weight: W (O, I), float32 or float64, in which everything is computed.
        ordered: of its inputs, in the same dtype.
        bits: of a code and of a zero point.
        group_size: D.
        static_groups: whether groups get their grids from the original weights, before anything is rounded. Else a
            group gets its grid when its turn comes.
        scale_search: whether grids are shrunk where that pays.
    """
    columns, groups, feedback, importance = ordered
    back = columns.argsort()
    by_column = importance[back]
    wanted = _without_dead(weight.T, by_column)
    state = _start(wanted[columns].contiguous(), feedback, importance, groups, bits, scale_search)
    if static_groups:
        _fit_runs(state, wanted, by_column, group_size)
    _round_all(state, _SPAN if static_groups else group_size, fit=not static_groups)
    return UniformCodes(
        codes=state.codes[back].T.contiguous(),
        zeros=state.zeros.T.contiguous().to(torch.uint8),
        scales=state.scales.T.contiguous(),
        column_groups=groups[back],
    )


def live_columns(importance: Tensor) -> Tensor:
    """Which columns are not dead (I,), of what errors in them cost (I,). Where all are, nothing is known: none is."""
    live = importance > 0
    return live | ~live.any()


def column_order(diagonal: Tensor, group_size: int, order: ColumnOrder) -> Tensor:
    """The columns in the order in which they are rounded (I,).

    The first column rounded is corrected by all others, the last by none, so the loudest inputs should come first.

    Args:
        diagonal: of H (I,).
        group_size: D.
        order: `none` is from left to right; `activation` is by falling diagonal (act-order of GPTQ's code);
            `group_aware` sorts whole groups by their mean, and columns only inside their group, so that groups stay
            runs of columns (the idea of GPTQModel's group aware reordering). A short last group stays last.
    """
    if order == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    if order == "activation":
        return diagonal.argsort(descending=True, stable=True)
    whole = len(diagonal) // group_size * group_size
    grouped = diagonal[:whole].view(-1, group_size)
    first = torch.arange(0, whole, group_size, device=diagonal.device).unsqueeze(1)
    inside = grouped.argsort(dim=1, descending=True, stable=True) + first
    outside = grouped.mean(dim=1).argsort(descending=True, stable=True)
    rest = diagonal[whole:].argsort(descending=True, stable=True) + whole
    return torch.cat([inside[outside].flatten(), rest])


def error_feedback(moment: Tensor, damping: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Which share of a column's error each later column takes over, and what an error costs after that.

    Args:
        moment: H (I, I), its rows and columns in the order of rounding.
        damping: relative to the mean of its diagonal.
        dtype: of the results; computed in float64.

    Returns:
        U_ij / U_ii (I, I) unit upper triangular, and R_ii^2 (I,), relative to their mean.
    """
    moment = moment.flip(0, 1)  # R is upper triangular, which a Cholesky factor of the flipped matrix is when flipped
    factor, _ = safe_cholesky(moment, damping)
    del moment  # here and below nothing is kept longer than needed: a gigabyte each at I = 11008
    costs = factor.diagonal().flip(0).square()
    inverse, diagonal = invert_lower_(factor), factor.diagonal().flip(0).unsqueeze(1)
    feedback = torch.empty(factor.shape, dtype=dtype, device=factor.device)
    for start, stop in _pieces(0, len(factor), _STRIP):
        rows = inverse[len(factor) - stop : len(factor) - start].flip(0, 1)
        feedback[start:stop] = rows.div_(diagonal[start:stop])
    return feedback, (costs / costs.mean()).to(dtype)


class _State(NamedTuple):
    """A weight while it is rounded; rows of (I, ...) are columns of the weight in the order of rounding."""

    target: Tensor  # (I, O), the weight with the errors passed on so far
    error: Tensor  # (I, O), target - rounded
    codes: Tensor  # (I, O) uint8
    zeros: Tensor  # (G, O)
    scales: Tensor  # (G, O)
    feedback: Tensor  # (I, I)
    importance: Tensor  # (I,)
    groups: list[int]
    bits: int
    search: bool


def _start(target: Tensor, feedback: Tensor, importance: Tensor, groups: Tensor, bits: int, search: bool) -> _State:
    zeros, scales = (target.new_zeros(int(groups.max()) + 1, target.shape[1]) for _ in range(2))
    error, codes = torch.zeros_like(target), torch.zeros_like(target, dtype=torch.uint8)
    return _State(target, error, codes, zeros, scales, feedback, importance, groups.tolist(), bits, search)


def _without_dead(weight: Tensor, importance: Tensor) -> Tensor:
    """W^T (I, O) with 0 in dead columns, as in GPTQ's code; the same tensor where there is none."""
    live = live_columns(importance)
    return weight if bool(live.all()) else weight.masked_fill(~live.unsqueeze(1), 0)


def _fit_runs(state: _State, weight: Tensor, importance: Tensor, group_size: int) -> None:
    """Grids of all groups from the original columns: weight W^T (I, O), importance (I,), both in original order."""
    for group, (start, stop) in enumerate(_pieces(0, len(weight), group_size)):
        state.zeros[group], state.scales[group] = searched_grid(
            weight[start:stop], importance[start:stop], state.bits, search=state.search
        )


def _round_all(state: _State, piece: int, *, fit: bool) -> None:
    """Every column, in spans of whole pieces, in pieces, in blocks. With `fit` a piece is a group and gets its grid."""
    span = max(1, _SPAN // piece) * piece
    for first, last in _pieces(0, len(state.target), span):
        _pass_on(state, 0, first, last)
        for start, stop in _pieces(first, last, piece):
            _pass_on(state, first, start, stop)
            if fit:
                _fit_group(state, start, stop)
            for begin, end in _pieces(start, stop, _BLOCK):
                _pass_on(state, start, begin, end)
                for column in range(begin, end):
                    _pass_on(state, begin, column, column + 1)
                    _round_column(state, column)


def _pass_on(state: _State, since: int, start: int, stop: int) -> None:
    """Subtract what the columns since:start did wrong from the columns start:stop."""
    if since < start:
        shares = state.feedback[since:start, start:stop]
        state.target[start:stop].addmm_(shares.T, state.error[since:start], alpha=-1)


def _fit_group(state: _State, start: int, stop: int) -> None:
    """The grid of a group from its weights as they are now."""
    group = state.groups[start]
    state.zeros[group], state.scales[group] = searched_grid(
        state.target[start:stop], state.importance[start:stop], state.bits, search=state.search
    )


def _round_column(state: _State, column: int) -> None:
    group, target = state.groups[column], state.target[column]
    zeros, scales = state.zeros[group], state.scales[group]
    codes = nearest_codes(target, zeros, scales, state.bits)
    state.codes[column] = codes
    torch.sub(target, (codes - zeros) * scales, out=state.error[column])


def _pieces(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    """The range start:stop cut into pieces of a length, the last one shorter."""
    for first in range(start, stop, length):
        yield first, min(first + length, stop)
