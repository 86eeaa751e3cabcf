"""The two passes that every quantizer of groups makes: error feedback from right to left, and sweeps.

Both are lazy: corrections inside a span of S groups are made group by group, those between spans by one product of
large matrices. How a group is encoded is the caller's. Weights are transposed, (I, O), so that a group of all rows is
contiguous.

Letters: O out, I = G D in, G groups a row, D group length, S groups of a span.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SPAN", "feedback_pass", "sweep_pass"]

SPAN = 16


def feedback_pass(
    weight: Tensor, lower: Tensor, length: int, encode: Callable[[int, Tensor], Tensor], *, span: int = SPAN
) -> Tensor:
    """From right to left, group g aims at W_g + (W - W_hat)_{>g} L_{>g,g}: LDLQ of QuIP (arXiv 2307.13304).

    Args:
        weight: W^T (I, O).
        lower: L (I, I) of `conditional_metrics`.
        length: D.
        encode: (g, target (D, O)) -> approximation of the target (D, O); it keeps the codes itself.
        span: S.

    Returns:
        The error (W - W_hat)^T (I, O).
    """
    target, error = weight.clone(), torch.zeros_like(weight)
    groups = len(weight) // length
    for stop in range(groups, 0, -span):
        start = max(0, stop - span)
        inside, done = slice(start * length, stop * length), slice(stop * length, None)
        target[inside] += lower[done, inside].T @ error[done]
        for g in reversed(range(start, stop)):
            here, before = slice(g * length, (g + 1) * length), slice(start * length, g * length)
            error[here] = weight[here] - encode(g, target[here])
            target[before] += lower[here, before].T @ error[here]
    return error


def sweep_pass(
    error: Tensor,
    moment: Tensor,
    length: int,
    order: Tensor,
    improve: Callable[[int, Tensor], Tensor],
    *,
    span: int = SPAN,
) -> None:
    """One pass of coordinate descent over all groups: each may take better codes, given all others.

    Args:
        error: (W - W_hat)^T (I, O), brought up to date in place.
        moment: H (I, I).
        length: D.
        order: of the groups (G,).
        improve: (g, gradient H_g (W - W_hat)^T (D, O)) -> change of W_hat^T in the group (D, O); it keeps the codes
            itself.
        span: S.
    """
    within = torch.arange(length, device=moment.device)
    for visited in torch.split(order, span):
        columns = (visited[:, None] * length + within).flatten()
        gradient, local = moment[columns] @ error, moment[columns][:, columns]
        for position, g in enumerate(visited.tolist()):
            block, here = (slice(start * length, (start + 1) * length) for start in (position, g))
            change = improve(g, gradient[block])
            gradient -= local[:, block] @ change
            error[here] -= change
