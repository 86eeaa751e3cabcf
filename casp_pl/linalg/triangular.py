"""The inverse of a triangular matrix in its own place: whole copies would be a gigabyte each at I = 11008."""

import torch
from torch import Tensor

__all__ = ["invert_lower_"]

_BLOCK = 512  # columns at a time


def invert_lower_(lower: Tensor) -> Tensor:
    """L^-1 in the place of L (I, I), whose upper triangle is 0.

    From right to left: with [A 0; B C] and C^-1 made already, what lies below A^-1 is -C^-1 B A^-1. Two thirds of the
    operations of a triangular solve with the identity, in large products.
    """
    for start in reversed(range(0, len(lower), _BLOCK)):
        stop = min(start + _BLOCK, len(lower))
        corner, below = lower[start:stop, start:stop], lower[stop:, start:stop]
        identity = torch.eye(stop - start, dtype=lower.dtype, device=lower.device)
        corner.copy_(torch.linalg.solve_triangular(corner, identity, upper=False))
        below.copy_(lower[stop:, stop:] @ (below @ corner)).neg_()
    return lower
