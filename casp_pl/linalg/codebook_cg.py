"""Least squares for codebooks: with codes and scales fixed the output error is quadratic in the codebooks.

AQLM (arXiv 2401.06118, phase 2) lowers it by steps of Adam; conjugate gradients solve its normal equations A c = b
here, without ever forming A, which has (K C D)^2 elements.

Letters: O out, I in, G groups a row, K codebooks, C entries a codebook, D group length.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from casp_pl.kernels.additive import AdditiveIndex
from casp_pl.linalg.products import full_width_matmul
from casp_pl.processes import sum_in_order

__all__ = ["conjugate_gradients", "fit_codebooks"]


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], residual: Tensor, preconditioner: Tensor, *, iterations: int
) -> Tensor:
    """A few steps of preconditioned conjugate gradients on A x = b for tensors of any shape, from x = 0.

    Args:
        apply: x -> A x, linear, symmetric, positive semidefinite.
        residual: b, or b - A x_0 to find the correction of a start x_0.
        preconditioner: the diagonal of A or an estimate of it, of residual's shape; zeros leave those unknowns at 0.
        iterations: at most so many applications of A; fewer when the residual is gone.

    Returns:
        The approximate solution, of residual's shape. Every step lowers x^T A x / 2 - b^T x.
    """
    inverse = torch.where(preconditioner > 0, 1 / preconditioner.clamp_min(torch.finfo(residual.dtype).tiny), 0)
    x = torch.zeros_like(residual)
    z = residual * inverse
    direction, rz = z, (residual * z).sum()
    negligible = torch.finfo(residual.dtype).eps * rz  # below it, steps along a null space of A grow without bound
    for _ in range(iterations):
        image = apply(direction)
        curvature = (direction * image).sum()
        if not (rz > negligible and curvature > 0):
            break
        step = rz / curvature
        x = x + step * direction
        residual = residual - step * image
        z = residual * inverse
        rz, before = (residual * z).sum(), rz
        direction = z + rz / before * direction
    return x


def fit_codebooks(
    weight_moment: Tensor,
    moment: Tensor,
    codes: AdditiveIndex,
    scales: Tensor,
    start: Tensor,
    *,
    iterations: int,
    sum_parts: Callable[[Tensor], Tensor] = sum_in_order,
) -> Tensor:
    """Lower tr(E H E^T), E = W - V with V decoded from codes, codebooks and scales, over the codebooks.

    Preconditioned by the diagonal of the normal equations as if an entry never met itself in another group of a row.

    Args:
        weight_moment: W H (O, I).
        moment: H (I, I), symmetric and positive definite.
        codes: of all groups (O, G, K), indexed.
        scales: s (O, 1).
        start: the codebooks to improve (K, C, D).
        iterations: steps of conjugate gradients, each of them one product with H.
        sum_parts: from the sums of the codes' parts of rows (P, K, C, D) to that of all rows: those of other processes
            as well where these share the rows.

    Returns:
        The codebooks (K, C, D).
    """

    def scatter(rows: Tensor) -> Tensor:
        return sum_parts(codes.scatter_parts(rows, scales))

    def normal_equations(codebooks: Tensor) -> Tensor:
        return scatter(full_width_matmul(codes.gather(codebooks, scales), moment))

    residual = scatter(weight_moment - full_width_matmul(codes.gather(start, scales), moment))
    own = scatter((scales * moment.diagonal()).contiguous())
    return start + conjugate_gradients(normal_equations, residual, own, iterations=iterations)
