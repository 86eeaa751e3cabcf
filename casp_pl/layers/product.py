"""Products with a weight that is rebuilt from its codes, a tile of rows at a time, and not kept where it is large.

autograd would keep the dense weight from the forward to the backward pass: of all layers together that is the dense
model, which compression was to avoid. To rebuild a weight costs far less than to multiply with it. On a CPU a large one
is never whole: fresh memory costs a page fault for every 4 KiB, and 256 tokens at 11008 x 4096 take 1.6 times as long.
A tile's memory is used again, and the tile lies in a cache when it is multiplied.

Letters: O out, I in.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from casp_pl.linalg import full_width_matmul, full_width_product

__all__ = ["linear", "rebuilt_linear", "row_tiles"]

_TILE_BYTES = 16 << 20
_LARGE = 1 << 22  # weights; to rebuild smaller ones backwards costs more than to keep them

WeightOfRows = Callable[[slice], Tensor]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear in the dtype of x, whatever that of the weight; under autocast in that of autocast."""
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    with full_width_product(x.shape[:-1].numel(), weight.numel()):
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def row_tiles(out_features: int, in_features: int, device: torch.device) -> list[slice]:
    """Rows that are rebuilt at once: all of them on a GPU, on a CPU so many as take 16 MiB in float32.

    The first of a tile is a multiple of 8, so that packed codes begin with a whole byte there.
    """
    most = max(64, _TILE_BYTES // (4 * in_features) // 8 * 8) if device.type == "cpu" else out_features
    return [slice(start, min(start + most, out_features)) for start in range(0, out_features, most)]


def rebuilt_linear(
    x: Tensor, weight: WeightOfRows, tiles: Sequence[slice], tables: tuple[Tensor, ...], bias: Tensor | None = None
) -> Tensor:
    """X W^T + bias, differentiable once with respect to x, the tables and the bias.

    Args:
        x: (..., I).
        weight: the rows of a tile (rows, I), differentiable with respect to the tables; it is called again backwards.
        tiles: of `row_tiles`.
        tables: all tensors that the weight depends on and that may require gradients.
        bias: (O,).
    """
    large = tiles[-1].stop * x.shape[-1] > _LARGE
    if large and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *tables)):
        y: Tensor = _Product.apply(x, weight, tiles, *tables)  # type: ignore[no-untyped-call]
    else:
        y = _multiply(x, weight, tiles)
    return y if bias is None else y + bias.to(y.dtype)


def _multiply(x: Tensor, weight: WeightOfRows, tiles: Sequence[slice]) -> Tensor:
    parts = (linear(x, weight(tile)) for tile in tiles)
    first = next(parts)
    if len(tiles) == 1:
        return first
    y = first.new_empty(*x.shape[:-1], tiles[-1].stop)
    y[..., tiles[0]] = first
    for tile, part in zip(tiles[1:], parts, strict=True):
        y[..., tile] = part
    return y


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which tiles are added up: in 16 bits every one of them would be rounded away from the sum."""
    return torch.promote_types(dtype, torch.float32)


class _Product(torch.autograd.Function):
    """Keeps the inputs alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: WeightOfRows, tiles: Sequence[slice], *tables: Tensor) -> Tensor:
        y = _multiply(x, weight, tiles)
        ctx.save_for_backward(x.to(y.dtype))  # under autocast y is narrow, and so is what autograd keeps
        ctx.weight, ctx.tiles, ctx.tables, ctx.dtype = weight, tiles, tables, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, outputs = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (ctx.saved_tensors[0], gradient))
        wanted = [table for table in ctx.tables if table.requires_grad]
        sums = [torch.zeros_like(table, dtype=_wide(table.dtype)) for table in wanted]
        of_x: Tensor | None = None
        for tile in ctx.tiles:
            own = outputs[:, tile]
            with torch.enable_grad():
                weight = ctx.weight(tile)
            if ctx.needs_input_grad[0]:
                part = full_width_matmul(own, weight.detach().to(own.dtype))
                of_x = part.to(_wide(part.dtype)) if of_x is None else of_x.add_(part)
            if wanted:
                found = torch.autograd.grad(weight, wanted, full_width_matmul(own.T, inputs).to(weight.dtype))
                for total, summand in zip(sums, found, strict=True):
                    total += summand
        of_tables = (total.to(table.dtype) for total, table in zip(sums, wanted, strict=True))
        of_x = None if of_x is None else of_x.to(ctx.dtype).view(*gradient.shape[:-1], inputs.shape[1])
        return (of_x, None, None, *(next(of_tables) if table.requires_grad else None for table in ctx.tables))
