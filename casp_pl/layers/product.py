"""Products with a weight that is rebuilt from its codes, in both directions, and never kept.

autograd would keep the dense weight from the forward to the backward pass: of all layers together that is the dense
model, which compression was to avoid. To rebuild a weight costs far less than to multiply with it.

Letters: O out, I in.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["rebuilt_linear"]


def rebuilt_linear(
    x: Tensor, dequantize: Callable[[], Tensor], tables: tuple[Tensor, ...], bias: Tensor | None
) -> Tensor:
    """X W^T + bias, differentiable once with respect to x, the tables and the bias.

    Args:
        x: (..., I).
        dequantize: the weight (O, I), differentiable with respect to the tables; it is called again backwards.
        tables: all tensors that the weight depends on and that may require gradients.
        bias: (O,).
    """
    wants = torch.is_grad_enabled() and any(table.requires_grad for table in (x, *tables))
    if not wants:
        return F.linear(x, dequantize(), bias)
    y: Tensor = _Product.apply(x, dequantize, *tables)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """Keeps the inputs alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dequantize: Callable[[], Tensor], *tables: Tensor) -> Tensor:
        y = F.linear(x, dequantize())
        ctx.save_for_backward(x.to(y.dtype))  # under autocast y is narrow, and so is what autograd keeps
        ctx.dequantize, ctx.tables, ctx.dtype = dequantize, tables, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        wanted = [table for table in ctx.tables if table.requires_grad]
        with torch.enable_grad():
            weight = ctx.dequantize()
        of_x = (gradient @ weight.detach().to(gradient.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        if not wanted:
            return (of_x, None, *(None for _ in ctx.tables))
        of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        found = iter(torch.autograd.grad(weight, wanted, of_weight.to(weight.dtype)))
        return (of_x, None, *(next(found) if table.requires_grad else None for table in ctx.tables))
