"""A fast orthogonal transform of any width that spreads every coordinate over all others.

QuIP# (arXiv 2402.04396, section 3) multiplies weights by Hadamard matrices, because coordinates that are mixed with
random signs look Gaussian. The transform here is U = A kron B of order n = a b, both applied as dense matrices: two
large products with a + b near 2 sqrt(n) run two to six times as fast on a CPU as a butterfly of log2(n) passes.

Where a Hadamard matrix of order n can be constructed, A and B are Hadamard matrices over the root of their order. Else
n = h m with the largest such h, and B takes a Hartley matrix of order m,

    cos(2 pi i j / m) + sin(2 pi i j / m), over sqrt(m),

as a factor: real, orthogonal, of any order, its entries at most sqrt(2) times as large as those of a Hadamard matrix
(QuIP# takes a Fourier transform there). So no width is refused and none needs padding; an odd prime width
costs a dense product. Letters: n the width, N vectors.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from casp_pl.linalg.hadamard import hadamard_matrix, is_constructible
from casp_pl.linalg.hadamard_extension import extension_name, extension_transform, runs_extension, takes_extension
from casp_pl.linalg.products import full_width_product

__all__ = [
    "TransformOrders",
    "transform_columns",
    "transform_matrix",
    "transform_name",
    "transform_orders",
    "transform_path",
    "transform_rows",
]


class TransformOrders(NamedTuple):
    """Orders of the Hadamard matrices A and B' and of the Hartley matrix M in U = A kron (B' kron M)."""

    outer: int
    inner: int
    hartley: int


@lru_cache(maxsize=4096)
def transform_orders(width: int) -> TransformOrders:
    """How a width is factored: as little Hartley as possible, then both factors as small as possible.

    Raises:
        ValueError: a width below 1.
    """
    if width < 1:
        raise ValueError(f"a transform needs a width of at least 1, not {width}")
    hartley = next(m for m in range(1, width + 1) if width % m == 0 and is_constructible(width // m))
    rest = width // hartley
    outers = [a for a in range(1, rest + 1) if rest % a == 0 and is_constructible(a) and is_constructible(rest // a)]
    outer = min(outers, key=lambda a: a + width // a)
    return TransformOrders(outer, rest // outer, hartley)


def transform_matrix(width: int) -> Tensor:
    """U (n, n) in float64, the oracle of `transform_rows` and `transform_columns`."""
    return torch.kron(*_factors(width, torch.float64, torch.device("cpu")))


def transform_path(width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """What a transform runs for such vectors on this device: "gemm" or "fast_hadamard_transform"."""
    return "fast_hadamard_transform" if takes_extension(width, dtype) and runs_extension(device) else "gemm"


def transform_name(device: torch.device) -> str:
    """What transforms run on this device, for people: `ours`, or the package and which widths it is for."""
    return f"{extension_name()} for powers of two, ours for others" if runs_extension(device) else "ours"


def transform_rows(x: Tensor, *, inverse: bool = False) -> Tensor:
    """U x for every vector along the last dimension, or U^T x. Differentiable.

    Args:
        x: (..., n), float32 or float64.
        inverse: U^T instead of U.
    """
    width = x.shape[-1]
    if transform_path(width, x.device, x.dtype) != "gemm":
        return extension_transform(x)  # Sylvester's matrix is symmetric: it is its own inverse
    outer, inner = _factors(width, x.dtype, x.device, inverse)
    with full_width_product(x.shape[:-1].numel(), width * len(inner)):
        return (outer @ (x.reshape(-1, len(outer), len(inner)) @ inner.T)).reshape(x.shape)


def transform_columns(x: Tensor, *, inverse: bool = False) -> Tensor:
    """U X for a matrix X (n, N), or U^T X: `transform_rows` of the transposed without transposing."""
    width = len(x)
    if transform_path(width, x.device, x.dtype) != "gemm":
        return extension_transform(x.T.contiguous()).T
    outer, inner = _factors(width, x.dtype, x.device, inverse)
    with full_width_product(x[0].numel(), width * len(inner)):
        mixed = outer @ x.reshape(len(outer), -1)
        return (inner @ mixed.view(len(outer), len(inner), -1)).view(x.shape)


@lru_cache(maxsize=64)
def _factors(width: int, dtype: torch.dtype, device: torch.device, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """A (a, a) and B (b, b), both orthogonal, or their transposes; kept for the next call."""
    with torch.inference_mode(False), torch.no_grad():
        orders = transform_orders(width)
        outer, inner = (hadamard_matrix(n).to(torch.float64) / math.sqrt(n) for n in orders[:2])
        inner = torch.kron(inner, _hartley_matrix(orders.hartley))
        outer, inner = (factor.T.contiguous() if inverse else factor for factor in (outer, inner))
        return outer.to(device, dtype), inner.to(device, dtype)


def _hartley_matrix(order: int) -> Tensor:
    index = torch.arange(order, device="cpu")
    # i j is reduced before it becomes an angle, which keeps it exact
    angle = (torch.outer(index, index) % order).to(torch.float64) * (2 * torch.pi / order)
    return (angle.cos() + angle.sin()) / math.sqrt(order)
