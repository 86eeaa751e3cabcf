"""Second moments as quantizers take them up, in float64: at I = 11008 every copy of one is a gigabyte."""

import torch
from torch import Tensor

__all__ = ["in_units"]


def in_units(second_moment: Tensor) -> Tensor:
    """A copy of H (I, I) in float64, symmetric to the last bit, its mean diagonal 1 where that is positive.

    Args:
        second_moment: H (I, I), any float dtype; stays as it is.
    """
    moment = second_moment.to(torch.float64)
    moment = (moment + moment.T).div_(2)
    unit = float(moment.diagonal().mean())
    return moment.div_(unit) if unit > 0 else moment
