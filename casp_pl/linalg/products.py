"""Large fp32 matrix products at the full width of a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["add_products", "full_width_products"]

_ROWS = 4096  # of a sum of products that are computed at once


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
    """Total (I, J) += left^T right of left (N, I) and right (N, J), in place, 4096 rows at a time.

    The sum may be wider than the products: of a 11008 x 11008 moment in float64 the products in float32 would take half
    as much again.
    """
    for start in range(0, len(total), _ROWS):
        rows = slice(start, start + _ROWS)
        total[rows] += left[:, rows].T @ right
