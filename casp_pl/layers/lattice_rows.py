"""Lattice codes prepared for products with a few tokens: as they are, or looked up as pairs.

Neighbouring coordinates of a point of E8P are one of 72 pairs.

Letters: O out, P padded width, N tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor

from casp_pl.kernels.compiled import LookupLoop, VectorLoops
from casp_pl.kernels.lattice import (
    LATTICE_STAGES,
    QUARTER,
    decode_points,
    e8_residual,
    e8p_pairs,
    pairs_of,
    unpack_lattice,
)
from casp_pl.kernels.lookup import CodeRows
from casp_pl.kernels.vectors import E8PRows

__all__ = ["LatticeRows"]


class LatticeRows:
    """Rows of Z, products with which are looked up.

    Args:
        packed: codes (O, G, bits), uint8.
        bits: 2, 3 or 4.
        loop: one of `lookup_loops`.
    """

    def __init__(self, packed: Tensor, bits: int, loop: LookupLoop) -> None:
        rows, first = packed.shape[0], 0
        ones = torch.ones(1, rows, device=packed.device)
        decoded = loop.vectors is not None and rows >= loop.vectors.least_rows
        self._products: list[Callable[[Tensor], Tensor]] = []
        for stage, codes in zip(LATTICE_STAGES[bits], unpack_lattice(packed, bits), strict=True):
            own, first = packed[..., first : first + stage.num_bytes], first + stage.num_bytes
            if stage.kind == "e8p" and decoded:
                points = E8PRows(own, cast(VectorLoops, loop.vectors))
                self._products.append(partial(points.multiply, scale=1 / stage.scale))
                continue
            if stage.kind == "e8p":
                pairs = pairs_of(decode_points(codes.view(-1), stage.points(packed.device)).view(rows, -1))
                looked_up, codebook = CodeRows(pairs, loop), e8p_pairs(packed.device)
            else:
                looked_up, codebook = CodeRows(own[..., 0], loop), e8_residual(packed.device)
            entries = codebook.float().unsqueeze(0) * (QUARTER / stage.scale)
            self._products.append(partial(looked_up.multiply, codebooks=entries, weights=ones))

    def multiply(self, x: Tensor) -> Tensor:
        """X Z^T: (N, P) -> (N, O) in float32."""
        products = [product(x) for product in self._products]
        return products[0] if len(products) == 1 else torch.stack(products).sum(dim=0)
