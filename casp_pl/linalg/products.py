"""Large fp32 matrix products at the full width of a CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["ProductSum", "add_products", "full_width_products"]

_ROWS = 1024  # of a sum of products that are computed at once


@contextmanager
def full_width_products() -> Iterator[None]:
    """Let torch multiply large fp32 matrices with oneDNN inside the block, where that is fp32 all the same.

    torch multiplies fp32 matrices with MKL, which uses half of the vector registers' width on CPUs of AMD: with AVX-512
    oneDNN takes 0.45 of MKL's time for large products, but two to three times as long for small ones (64 x 64, or a
    vector). Torch goes to oneDNN where the precision of the products may be lowered to bf16. oneDNN makes use of that
    only where it finds AMX, so there, and without AVX-512, nothing is changed.
    """
    capabilities = torch.cpu.get_capabilities()
    mkldnn: Any = torch.backends.mkldnn  # a module that replaces itself, so mypy does not know its attributes
    settings = mkldnn.matmul
    before = settings.fp32_precision
    if capabilities.get("avx512_f", False) and not capabilities.get("amx_tile", False):
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Total (I, J) += left^T right of left (N, I) and right (N, J), in place, 1024 rows at a time.

    The sum may be wider than the products: of a 11008 x 11008 moment in float64 the products would take half as much
    again in float32, and torch widens them before it adds them.
    """
    for start in range(0, len(total), _ROWS):
        rows = slice(start, start + _ROWS)
        total[rows] += left[:, rows].T @ right


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
        lengths = [min(_ROWS, rows - start) for start in range(0, rows, _ROWS)]
        self._strips = [torch.zeros(length, columns, dtype=torch.float64, device=device) for length in lengths]

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add left^T right of left (N, I) and right (N, J)."""
        for start, strip in zip(range(0, left.shape[1], _ROWS), self._strips, strict=True):
            strip += left[:, start : start + _ROWS].T @ right

    def narrow(self, finish: Callable[[Tensor], Tensor]) -> Tensor:
        """`finish` of every strip (at most 1024, J), together as one matrix (I, J) in float32; the sum is used up."""
        whole = self._strips[0].new_empty(sum(map(len, self._strips)), self._strips[0].shape[1], dtype=torch.float32)
        for rows in torch.split(whole, _ROWS):
            rows.copy_(finish(self._strips.pop(0)))
        return whole
