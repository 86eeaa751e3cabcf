"""GPTQ's codes against the paper's plain loop: dense inverses, one column at a time, grids by trying every point."""

import itertools

import pytest
import torch
from torch import Tensor

from casp_pl.errors import NumericsError
from casp_pl.linalg.losses import proxy_loss
from casp_pl.quantizers.gptq_codes import UniformCodes, column_order, error_feedback, gptq_codes, ordered_feedback

ORDERS = ("none", "activation", "group_aware")
OPTIONS = list(itertools.product(ORDERS, (False, True), (False, True)))
SHAPES = [(1, 1, 4), (3, 5, 2), (7, 13, 13), (9, 67, 16), (4, 150, 7), (5, 200, 64), (6, 40, 1)]


def _problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight and a second moment of correlated inputs of unequal size, both float64."""
    generator = torch.Generator().manual_seed(1000 * rows + columns)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    loudness = torch.exp(torch.randn(columns, generator=generator))
    x = (torch.randn(4 * columns, columns, generator=generator) @ mixing * loudness).double()
    weight = 0.02 * torch.randn(rows, columns, generator=generator).double()
    return weight, x.T @ x / len(x)


def _reference_order(diagonal: list[float], group_size: int, order: str) -> list[int]:
    columns = list(range(len(diagonal)))
    if order == "none":
        return columns
    if order == "activation":
        return sorted(columns, key=lambda i: -diagonal[i])
    groups = [columns[start : start + group_size] for start in range(0, len(columns), group_size)]
    tail = [groups.pop()] if len(columns) % group_size else []
    groups.sort(key=lambda group: -sum(diagonal[i] for i in group) / len(group))
    return [i for group in groups + tail for i in sorted(group, key=lambda i: -diagonal[i])]


def _nearest_point(weight: Tensor, zeros: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Codes (O, D) by the distance to every point of the grid."""
    points = (torch.arange(2**bits) - zeros[:, None]) * scales[:, None]  # (O, P)
    return (weight[:, :, None] - points[:, None]).abs().argmin(dim=2)


def _reference_grid(weight: Tensor, costs: Tensor, bits: int, search: bool) -> tuple[Tensor, Tensor]:
    """Of one group, weight (O, D): the range, or the cheapest of all candidates, one after the other."""
    top, best = 2**bits - 1, None
    shifts = (0, -1, 1) if search else (0,)
    for shrink, shift in itertools.product([1 - 0.6 * i / 11 for i in range(12)] if search else [1.0], shifts):
        low, high = shrink * weight.amin(1).clamp(max=0), shrink * weight.amax(1).clamp(min=0)
        scales = ((high - low) / top).clamp(min=2.0**-24).half().double()
        zeros = ((-low / scales).round().clamp(0, top) + shift).clamp(0, top)
        rounded = (_nearest_point(weight, zeros, scales, bits) - zeros[:, None]) * scales[:, None]
        cost = ((weight - rounded).square() * costs).sum(1)
        if best is None:
            best = [cost, zeros, scales]
        better = cost < best[0]
        best = [torch.where(better, new, old) for new, old in zip((cost, zeros, scales), best, strict=True)]
    return best[1], best[2]


def gptq_reference(
    weight: Tensor, moment: Tensor, bits: int, group_size: int, order: str, static: bool, search: bool, damping: float
) -> UniformCodes:
    """Arxiv 2210.17323, equation 2, with the inverse of what remains of H computed anew for every column."""
    rows, columns = weight.shape
    damped = moment + damping * moment.diagonal().mean() * torch.eye(columns)
    sequence = _reference_order(moment.diagonal().tolist(), group_size, order)
    inverses = [torch.linalg.inv(damped[sequence[p:]][:, sequence[p:]]) for p in range(columns)]
    costs = torch.zeros(columns, dtype=torch.float64)
    for p, i in enumerate(sequence):
        costs[i] = 1 / inverses[p][0, 0]
    is_regrouped = order == "activation" and not static
    group_of = {i: (p if is_regrouped else i) // group_size for p, i in enumerate(sequence)}
    members = [[i for i in sequence if group_of[i] == g] for g in range(-(-columns // group_size))]
    rest, codes = weight.clone(), torch.zeros(rows, columns, dtype=torch.int64)
    zeros, scales = torch.zeros(rows, len(members)).double(), torch.zeros(rows, len(members)).double()
    fitted = set()
    for g, group in enumerate(members if static else []):
        zeros[:, g], scales[:, g] = _reference_grid(weight[:, group], costs[group], bits, search)
        fitted.add(g)
    for p, i in enumerate(sequence):
        g, later = group_of[i], sequence[p:]
        if g not in fitted:
            zeros[:, g], scales[:, g] = _reference_grid(rest[:, members[g]], costs[members[g]], bits, search)
            fitted.add(g)
        codes[:, i] = _nearest_point(rest[:, i : i + 1], zeros[:, g], scales[:, g], bits)[:, 0]
        error = rest[:, i] - (codes[:, i] - zeros[:, g]) * scales[:, g]
        rest[:, later] -= torch.outer(error, inverses[p][0]) / inverses[p][0, 0]
    return UniformCodes(codes, zeros, scales, torch.tensor([group_of[i] for i in range(columns)]))


def _codes(
    weight: Tensor, moment: Tensor, bits: int, group_size: int, order: str, static: bool, search: bool, damping: float
) -> UniformCodes:
    ordered = ordered_feedback(moment, group_size, order, static, damping, weight.dtype)
    return gptq_codes(weight, ordered, bits=bits, group_size=group_size, static_groups=static, scale_search=search)


def _decode(found: UniformCodes) -> Tensor:
    groups = found.column_groups
    return (found.codes.double() - found.zeros.double()[:, groups]) * found.scales.double()[:, groups]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("order", "static", "search"), OPTIONS)
def test_equal_to_the_plain_loop(shape: tuple[int, int, int], order: str, static: bool, search: bool) -> None:
    rows, columns, group_size = shape
    weight, moment = _problem(rows, columns)
    bits = 2 + columns % 3
    settings = (bits, group_size, order, static, search, 0.01)
    expected = gptq_reference(weight, moment, *settings)
    found = _codes(weight, moment, *settings)
    assert torch.equal(found.column_groups, expected.column_groups)
    for name in ("codes", "zeros", "scales"):
        assert torch.equal(getattr(found, name).double(), getattr(expected, name).double()), name
    single = _codes(weight.float(), moment.float(), *settings)
    assert (single.codes == expected.codes).float().mean() > 0.98  # a tie that falls otherwise moves what follows it
    assert proxy_loss(weight, _decode(single), moment) == pytest.approx(
        proxy_loss(weight, _decode(expected), moment), rel=1e-2 if (single.codes != expected.codes).any() else 1e-4
    )


def test_a_last_column_is_the_best_that_the_others_allow() -> None:
    """Whatever came before, exhaustive search finds nothing better for the column that is rounded last."""
    weight, moment = _problem(20, 12)
    found = _codes(weight, moment, 2, 4, "none", True, True, 0.0)

    def row_losses(codes: Tensor) -> Tensor:
        error = weight - _decode(found._replace(codes=codes))
        return ((error @ moment) * error).sum(1)

    chosen = row_losses(found.codes)
    for code in range(4):
        other = found.codes.clone()
        other[:, -1] = code
        assert (chosen <= row_losses(other) + 1e-12).all()


def test_error_feedback_is_the_conditional_of_the_second_moment() -> None:
    """The cost of an error after the best correction, and that correction, by dense solves."""
    _, moment = _problem(2, 9)
    damped = moment + 0.05 * moment.diagonal().mean() * torch.eye(9)
    feedback, costs = error_feedback(moment, 0.05)
    exact = []
    for i in range(9):
        later = damped[i + 1 :, i + 1 :]
        correction = torch.linalg.solve(later, damped[i + 1 :, i])
        exact.append(damped[i, i] - damped[i, i + 1 :] @ correction)
        torch.testing.assert_close(feedback[i, i + 1 :], -correction)
        assert not feedback[i, :i].any()
    torch.testing.assert_close(costs, torch.stack(exact) / torch.stack(exact).mean())


@pytest.mark.parametrize("columns", [1, 1023, 1025, 1601])
def test_error_feedback_in_strips_is_the_whole(columns: int) -> None:
    """U of (H + jitter)^-1 = U^T U by a dense inverse; strips of rows and blocks of columns end anywhere."""
    inputs = torch.randn(2 * columns, columns, generator=torch.Generator().manual_seed(columns), dtype=torch.float64)
    moment = inputs.T @ inputs
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    feedback, costs = error_feedback(moment, 0.01)
    torch.testing.assert_close(feedback, upper / upper.diagonal()[:, None], rtol=1e-8, atol=1e-10)
    exact = upper.diagonal() ** -2
    torch.testing.assert_close(costs, exact / exact.mean())
    assert [part.dtype for part in error_feedback(moment, 0.01, torch.float32)] == [torch.float32] * 2


@pytest.mark.parametrize(("columns", "group_size"), [(1, 4), (12, 4), (13, 4), (9, 1), (5, 64)])
@pytest.mark.parametrize("order", ORDERS)
def test_orders(columns: int, group_size: int, order: str) -> None:
    diagonal = torch.rand(columns, generator=torch.Generator().manual_seed(columns), dtype=torch.float64)
    found = column_order(diagonal, group_size, order)
    assert found.tolist() == _reference_order(diagonal.tolist(), group_size, order)
    assert column_order(torch.ones(columns), group_size, order).tolist() == list(range(columns))


def test_a_moment_that_is_none_is_refused() -> None:
    weight, moment = _problem(2, 6)
    moment[3, 3] = torch.nan
    with pytest.raises(NumericsError):
        _codes(weight, moment, 2, 4, "none", False, False, 0.01)
