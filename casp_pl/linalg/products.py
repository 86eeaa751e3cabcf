"""Large fp32 matrix products at the full width of a CPU."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["GramSum", "ProductSum", "full_width_matmul", "full_width_product", "full_width_products"]

_ROWS = 512  # of a sum of products that are computed at once
_FEWEST_ROWS, _FEWEST_WEIGHTS = 16, 1 << 16  # from here on a product gains, as measured on a Zen 5


@contextmanager
def full_width_products() -> Iterator[None]:
    """Let torch multiply large fp32 matrices with oneDNN inside the block, where that is fp32 all the same.

    torch multiplies fp32 matrices with MKL, which uses half of the vector registers' width on CPUs of AMD: with AVX-512
    oneDNN takes 0.45 of MKL's time for large products, but two to three times as long for small ones (64 x 64, or a
    vector). Torch goes to oneDNN where the precision of the products may be lowered to bf16. oneDNN makes use of that
    only where it finds AMX, so there, and without AVX-512, nothing is changed.
    """
    mkldnn: Any = torch.backends.mkldnn  # a module that replaces itself, so mypy does not know its attributes
    settings = mkldnn.matmul
    before = settings.fp32_precision
    if _is_fp32_all_the_same():
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def full_width_product(rows: int, weights: int) -> AbstractContextManager[None]:
    """`full_width_products` for a product of N rows with a matrix of so many weights (I J), if it gains.

    Two limits, not one of multiplications: a share of the rows must come out as it does among all of them.
    """
    return full_width_products() if rows >= _FEWEST_ROWS and weights >= _FEWEST_WEIGHTS else nullcontext()


def full_width_matmul(left: Tensor, right: Tensor) -> Tensor:
    """The product of left (N, I) and right (I, J) by way of `full_width_product`; rows of left may be shared out."""
    with full_width_product(len(left), right.numel()):
        return left @ right


@lru_cache(maxsize=1)
def _is_fp32_all_the_same() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_f", False) and not capabilities.get("amx_tile", False))


class ProductSum:
    """The sum of left^T right (I, J) over batches, in float64; in strips of rows, to be narrowed one after the other.

    A sum in float32 would depend on the order of its terms, and so on the number of processes. As one matrix it would
    have to be there while its copy in float32 is made: half a gigabyte more at I = J = 11008.

    Args:
        rows: I.
        columns: J.
        device: where it is summed.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self._strips = [_zeros(len(strip), columns, device) for strip in _strips(rows)]

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add left^T right of left (N, I) and right (N, J)."""
        for rows, strip in zip(torch.split(left, _ROWS, dim=1), self._strips, strict=True):
            strip += rows.T @ right

    def narrow(self, finish: Callable[[Tensor], Tensor]) -> Tensor:
        """`finish` of every strip (at most 512, J), together as one matrix (I, J) in float32; the sum is used up."""
        whole = self._strips[0].new_empty(sum(map(len, self._strips)), self._strips[0].shape[1], dtype=torch.float32)
        for rows in torch.split(whole, _ROWS):
            rows.copy_(finish(self._strips.pop(0)))
        return whole


class GramSum:
    """The sum of x^T x (I, I) over batches as `ProductSum` has it, by way of the triangle above its diagonal alone.

    Args:
        width: I.
        device: where it is summed.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._width = width
        self._strips = [_zeros(len(strip), width - strip.start, device) for strip in _strips(width)]

    def add(self, x: Tensor) -> None:
        """Add x^T x of x (N, I)."""
        for rows, strip in zip(_strips(self._width), self._strips, strict=True):
            strip += x[:, rows.start : rows.stop].T @ x[:, rows.start :]

    def narrow(self, finish: Callable[[Tensor], Tensor]) -> Tensor:
        """`finish` of every strip (at most 512, from its diagonal on), as one matrix (I, I) in float32, symmetric.

        The sum is used up.
        """
        whole = self._strips[0].new_empty(self._width, self._width, dtype=torch.float32)
        for rows in _strips(self._width):
            upper = whole[rows.start : rows.stop, rows.start :]
            upper.copy_(finish(self._strips.pop(0)))
            corner = upper[:, : len(rows)].triu()
            upper[:, : len(rows)] = corner + corner.triu(1).T
            whole[rows.stop :, rows.start : rows.stop] = upper[:, len(rows) :].T
        return whole


def _strips(rows: int) -> list[range]:
    return [range(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS)]


def _zeros(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.zeros(rows, columns, dtype=torch.float64, device=device)
