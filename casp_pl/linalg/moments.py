"""Second moments as quantizers take them up: at I = 11008 every copy in float64 is a gigabyte."""

import torch
from torch import Tensor

__all__ = ["in_units", "moment_unit", "symmetrize_"]

_STRIP = 512  # rows at a time


def in_units(second_moment: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """A copy of H (I, I), symmetric to the last bit, its mean diagonal 1 where that is positive.

    Args:
        second_moment: H (I, I), any float dtype; stays as it is.
        dtype: of the copy, in which it is computed.
    """
    return symmetrize_(second_moment.to(dtype, copy=True)).div_(moment_unit(second_moment))


def moment_unit(second_moment: Tensor) -> float:
    """Mean diagonal of H (I, I) where that is positive, else 1."""
    mean = float(second_moment.diagonal().mean(dtype=torch.float64))
    return mean if mean > 0 else 1.0


def symmetrize_(matrix: Tensor) -> Tensor:
    """(A + A^T) / 2 in the place of A (I, I); symmetric to the last bit."""
    for start in range(0, len(matrix), _STRIP):
        rows, columns = matrix[start : start + _STRIP, start:], matrix[start:, start : start + _STRIP]
        mean = (rows + columns.T).div_(2)
        rows.copy_(mean)
        columns.copy_(mean.T)
    return matrix
