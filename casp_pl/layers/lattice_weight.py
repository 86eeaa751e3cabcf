"""The weight of lattice codes: QuIP# (arXiv 2402.04396, sections 3 and 4) read backwards.

    W = diag(sv) U_O^T Z U_P diag(su),   Z[o, 8g : 8g+8] = sum over the stages of point(codes[o, g]) / scale

U_O and U_P are the orthogonal transforms of `casp_pl.linalg.orthogonal`. Letters: O out, I in, P = 8 G >= I the padded
width (columns beyond I meet inputs that are zero and are cut off), S stages.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from casp_pl.kernels.compiled import weight_loops
from casp_pl.kernels.lattice import (
    GROUP_LENGTH,
    LATTICE_STAGES,
    QUARTER,
    decode_points,
    unpack_lattice,
)
from casp_pl.kernels.vectors import lattice_tables
from casp_pl.linalg.orthogonal import transform_columns, transform_matrix, transform_rows

__all__ = [
    "dequantize_lattice",
    "dequantize_lattice_reference",
    "lattice_points",
    "lattice_quarters",
    "multiply_lattice",
]


def lattice_quarters(packed: Tensor, bits: int) -> Tensor:
    """Points of all codes in quarters: packed (O, G, bits) uint8 -> (S, O, P) int8."""
    rows, groups, _ = packed.shape
    stages = zip(LATTICE_STAGES[bits], unpack_lattice(packed, bits), strict=True)
    decoded = [decode_points(codes.view(-1), stage.points(packed.device)) for stage, codes in stages]
    return torch.stack(decoded).view(-1, rows, 8 * groups)


def dequantize_lattice_reference(quarters: Tensor, su: Tensor, sv: Tensor, bits: int) -> Tensor:
    """The formula itself with dense matrices, in operations that autograd knows. The oracle of `dequantize_lattice`."""
    left, right = (transform_matrix(n).to(su.device, su.dtype) for n in quarters.shape[1:])
    scales = [QUARTER / stage.scale for stage in LATTICE_STAGES[bits]]
    points = torch.stack([own.to(su.dtype) * scale for own, scale in zip(quarters, scales, strict=True)]).sum(dim=0)
    return sv[:, None] * (left.T @ points @ right)[:, : len(su)] * su


def dequantize_lattice(packed: Tensor, su: Tensor, sv: Tensor) -> Tensor:
    """Weight of lattice codes, differentiable with respect to su and sv, once.

    Args:
        packed: the codes (O, G, bits), uint8.
        su: signs and scales of the inputs (I,).
        sv: signs and scales of the outputs (O,).

    Returns:
        The weight (O, I) in the dtype of su.
    """
    weight: Tensor = _Dequantize.apply(su, sv, packed)  # type: ignore[no-untyped-call]
    return weight


class _Dequantize(torch.autograd.Function):
    """Keeps only su and sv for the backward pass: to transform again costs less than a second dense weight."""

    @staticmethod
    def forward(ctx: Any, su: Tensor, sv: Tensor, packed: Tensor) -> Tensor:
        ctx.save_for_backward(su, sv)
        ctx.packed = packed
        return _mixed_back(packed, su).mul_(sv[:, None]).mul_(su)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        su, sv = ctx.saved_tensors
        product = _mixed_back(ctx.packed, su).mul_(gradient)
        of_su = sv @ product if ctx.needs_input_grad[0] else None
        of_sv = product @ su if ctx.needs_input_grad[1] else None
        return of_su, of_sv, None


class _MixedBack(torch.autograd.Function):
    """U_O^T applied to products, times sv, in a wider dtype; keeps the products, which take half of the room."""

    @staticmethod
    def forward(ctx: Any, products: Tensor, sv: Tensor, wide: torch.dtype) -> Tensor:
        ctx.save_for_backward(products, sv)
        ctx.wide = wide
        return transform_rows(products.to(wide), inverse=True) * sv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        products, sv = ctx.saved_tensors
        of_products = of_sv = None
        with torch.autocast(gradient.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                of_products = transform_rows(gradient * sv).to(products.dtype)
            if ctx.needs_input_grad[1]:
                again = transform_rows(products.to(ctx.wide), inverse=True)
                of_sv = again.mul_(gradient).reshape(-1, len(sv)).sum(dim=0).to(sv.dtype)
        return of_products, of_sv, None


def multiply_lattice(x: Tensor, product: Callable[[Tensor], Tensor], su: Tensor, sv: Tensor, width: int) -> Tensor:
    """X W^T without forming W: the transforms are applied to inputs and outputs.

    In training the gradient of a dense weight, a third of all products, is never computed. A weight 4096 x 4096 in
    float32 on one thread: 1.5 s forward and backward for 1024 tokens; by way of `dequantize_lattice` 1.9 s.

    Args:
        x: (..., I).
        product: of transformed inputs (..., P), in the dtype of x, with Z: (..., O).
        su: (I,).
        sv: (O,).
        width: P.

    Returns:
        (..., O) in float32 or wider, differentiable with respect to x, su and sv; once where products are narrower.
    """
    surplus = width - len(su)
    wide = torch.promote_types(torch.promote_types(x.dtype, su.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        scaled = x * su.to(wide)  # a narrow x is what autograd keeps
        mixed = transform_rows(F.pad(scaled, (0, surplus)) if surplus else scaled)
    products = product(mixed.to(x.dtype))
    with torch.autocast(x.device.type, enabled=False):  # y / sv, fifty times a large output, is beyond float16
        if products.dtype == wide:
            return transform_rows(products, inverse=True) * sv
        output: Tensor = _MixedBack.apply(products, sv, wide)  # type: ignore[no-untyped-call]
        return output


def lattice_points(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Z (O, P) of packed codes (O, G, bits), uint8."""
    rows, groups, bits = packed.shape
    if (loops := weight_loops(packed.device, dtype)) is not None:
        points = torch.empty(rows, GROUP_LENGTH * groups, dtype=torch.float32, device=packed.device)
        scales = torch.ones(rows, dtype=torch.float32, device=packed.device)
        loops.lattice(packed, lattice_tables(bits), scales, points)
        return points.to(dtype)
    total = torch.zeros(rows, GROUP_LENGTH * groups, dtype=dtype, device=packed.device)
    for own, stage in zip(lattice_quarters(packed, bits), LATTICE_STAGES[bits], strict=True):
        total.add_(own, alpha=QUARTER / stage.scale)
    return total


def _mixed_back(packed: Tensor, like: Tensor) -> Tensor:
    """U_O^T Z U_P, cut to the width and dtype of `like`: (O, I). It is computed in float32 or wider."""
    points = lattice_points(packed, torch.promote_types(like.dtype, torch.float32))
    rows = transform_rows(points, inverse=True)[:, : len(like)]
    return transform_columns(rows, inverse=True).to(like.dtype)
