"""Lattice codes prepared for products with a few tokens: as they are, or looked up as pairs.

Neighbouring coordinates of a point of E8P are one of 72 pairs.

Letters: O out, P padded width, N tokens.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from casp_pl.kernels.compiled import LookupLoop
from casp_pl.kernels.lattice import (
    GROUP_LENGTH,
    LATTICE_STAGES,
    QUARTER,
    LatticeStage,
    decode_points,
    e8_residual,
    e8p_pairs,
    pairs_of,
    unpack_lattice,
)
from casp_pl.kernels.lookup import CodeRows
from casp_pl.kernels.vectors import LatticeBytes

__all__ = ["LatticeRows"]

_E8P_BITS = 2  # a weight: a stage of E8P alone is packed as such a layer is


class LatticeRows:
    """Rows of Z, products with which are looked up.

    Args:
        packed: codes (O, G, bits), uint8.
        bits: 2, 3 or 4.
        loop: one of `lookup_loops`.
    """

    def __init__(self, packed: Tensor, bits: int, loop: LookupLoop) -> None:
        self._products: list[Callable[[Tensor], Tensor]] = []
        if (vectors := loop.taking(GROUP_LENGTH, len(packed)).vectors) is not None:
            self._products.append(LatticeBytes(packed, vectors).multiply)
        else:
            self._products.extend(_of_stages(packed, bits, loop))

    def multiply(self, x: Tensor) -> Tensor:
        """X Z^T: (N, P) -> (N, O) in float32."""
        products = [product(x) for product in self._products]
        return products[0] if len(products) == 1 else torch.stack(products).sum(dim=0)


def _of_stages(packed: Tensor, bits: int, loop: LookupLoop) -> Iterator[Callable[[Tensor], Tensor]]:
    first = 0
    for stage in LATTICE_STAGES[bits]:
        yield _product(packed[..., first : first + stage.num_bytes], stage, loop)
        first += stage.num_bytes


def _product(codes: Tensor, stage: LatticeStage, loop: LookupLoop) -> Callable[[Tensor], Tensor]:
    """X (N, P) -> its products with the points of a stage (N, O); codes (O, G, bytes), uint8."""
    rows = len(codes)
    if stage.kind == "e8p":
        numbers = unpack_lattice(codes, _E8P_BITS)[0]
        points = decode_points(numbers.view(-1), stage.points(codes.device))
        own, codebook = pairs_of(points.view(rows, -1)), e8p_pairs(codes.device)
    else:
        own, codebook = codes[..., 0], e8_residual(codes.device)
    entries = codebook.float().unsqueeze(0) * (QUARTER / stage.scale)
    ones = torch.ones(1, rows, dtype=torch.float32, device=codes.device)
    return partial(CodeRows(own, loop).multiply, codebooks=entries, weights=ones)
