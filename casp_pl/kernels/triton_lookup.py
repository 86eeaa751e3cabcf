"""Products with codes, and weights of codes, on a GPU: kernels in Triton, which comes with torch for CUDA.

One formula serves every format (`casp_pl.kernels.lookup`): codes choose entries of codebooks that lie in the first
cache of a multiprocessor, so a product reads a byte from memory where a dense one reads the weights it stands for.

Their logic is tested in Triton's interpreter and they are compiled for sm_80 and sm_90 in a test; they have not been
measured on a GPU.

Letters: N tokens, O rows, G groups of inputs, D inputs a group, K codebooks, C entries a codebook, M = G K positions of
a row's codes, S spans of positions, each with scales of its own.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gather", "lookup"]

_ROWS, _GROUPS = 32, 16  # of a tile

_device_of: Any = torch.cuda.device_of  # Triton launches on the current device, wherever the tensors lie


@triton.jit  # type: ignore[untyped-decorator]
def _entries(codes, books, weights, o, g, d, rows, groups, length, entries, span, BOOKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights of a tile (rows, groups, inputs of a group) in float32; zero outside."""
    inside = (o[:, None] < rows) & (g[None, :] < groups)
    wide = inside[:, :, None] & (d[None, None, :] < length)
    tile = tl.zeros(wide.shape, dtype=tl.float32)
    for k in tl.static_range(BOOKS):
        position = g[None, :] * BOOKS + k
        code = tl.load(codes + o[:, None] * groups * BOOKS + position, mask=inside, other=0).to(tl.int32)
        scale = tl.load(weights + position // span * rows + o[:, None], mask=inside, other=0)
        place = (k * entries + code)[:, :, None] * length + d[None, None, :]
        tile += scale[:, :, None] * tl.load(books + place, mask=wide, other=0)
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def _lookup(  # type: ignore[no-untyped-def]
    x, books, codes, weights, sums, rows, groups, length, entries, span,
    BOOKS: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A program computes ROWS outputs of one token."""
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1)
    d = tl.arange(0, LENGTH)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, groups, GROUPS):
        g = start + tl.arange(0, GROUPS)
        tile = _entries(codes, books, weights, o, g, d, rows, groups, length, entries, span, BOOKS)
        inside = (g[:, None] < groups) & (d[None, :] < length)
        place = token * groups * length + g[:, None] * length + d[None, :]
        inputs = tl.load(x + place, mask=inside, other=0)
        total += tl.sum(tl.sum(tile * inputs[None], axis=2), axis=1)
    tl.store(sums + token * rows + o, total, mask=o < rows)


@triton.jit  # type: ignore[untyped-decorator]
def _gather(  # type: ignore[no-untyped-def]
    books, codes, weights, out, rows, groups, length, entries, span,
    BOOKS: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A program writes a tile of the weight."""
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    d = tl.arange(0, LENGTH)
    tile = _entries(codes, books, weights, o, g, d, rows, groups, length, entries, span, BOOKS)
    place = (o[:, None] * groups + g[None, :])[:, :, None] * length + d[None, None, :]
    inside = ((o[:, None] < rows) & (g[None, :] < groups))[:, :, None] & (d[None, None, :] < length)
    tl.store(out + place, tile, mask=inside)


def lookup(x: Tensor, books: Tensor, codes: Tensor, weights: Tensor, span: int, sums: Tensor) -> None:
    """The sums of `numba_lookup.lookup`, with the same arguments but `books` (K, C, D)."""
    tokens, groups, length = x.shape
    rows = len(codes)
    grid = (triton.cdiv(rows, _ROWS), tokens)
    with _device_of(x):
        _lookup[grid](
            x, books, codes, weights, sums, rows, groups, length, books.shape[1], span,
            BOOKS=len(books), LENGTH=triton.next_power_of_2(length), ROWS=_ROWS, GROUPS=_GROUPS,
        )  # fmt: skip


def gather(codes: Tensor, books: Tensor, scales: Tensor, weight: Tensor) -> None:
    """What `numba_additive.gather` writes, with the same arguments; contiguous as there."""
    (rows, groups, count), (_, entries, length) = codes.shape, books.shape
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(groups, _GROUPS))
    with _device_of(weight):
        _gather[grid](
            books.contiguous(), codes.contiguous(), scales.contiguous(), weight,
            rows, groups, length, entries, groups * count,  # one span: a row has one scale
            BOOKS=count, LENGTH=triton.next_power_of_2(length), ROWS=_ROWS, GROUPS=_GROUPS,
        )  # fmt: skip
