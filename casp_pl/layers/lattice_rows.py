"""Lattice codes prepared for look-up: neighbouring coordinates of an E8P point are one of 72 pairs.

Letters: O out, P padded width, N tokens.
"""

import torch
from torch import Tensor

from casp_pl.kernels.compiled import LookupLoop
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

__all__ = ["LatticeRows"]


class LatticeRows:
    """Rows of Z, products with which are looked up.

    Args:
        packed: codes (O, G, bits), uint8.
        bits: 2, 3 or 4.
        loop: one of `lookup_loops`.
    """

    def __init__(self, packed: Tensor, bits: int, loop: LookupLoop) -> None:
        rows = packed.shape[0]
        self._ones = torch.ones(1, rows, device=packed.device)
        self._parts: list[tuple[CodeRows, Tensor]] = []
        for stage, codes in zip(LATTICE_STAGES[bits], unpack_lattice(packed, bits), strict=True):
            if stage.kind == "e8p":
                own = pairs_of(decode_points(codes.view(-1), stage.points(packed.device)).view(rows, -1))
                codebook = e8p_pairs(packed.device)
            else:
                own, codebook = codes.to(torch.uint8), e8_residual(packed.device)
            self._parts.append((CodeRows(own, loop), codebook.float().unsqueeze(0) * (QUARTER / stage.scale)))

    def multiply(self, x: Tensor) -> Tensor:
        """X Z^T: (N, P) -> (N, O) in float32."""
        products = [rows.multiply(x, codebook, self._ones) for rows, codebook in self._parts]
        return products[0] if len(products) == 1 else torch.stack(products).sum(dim=0)
