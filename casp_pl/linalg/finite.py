"""One check for values that no maths survives."""

import torch
from torch import Tensor

from casp_pl.errors import NumericsError

__all__ = ["require_finite"]

_PART = 1 << 22  # values at a time


def require_finite(tensor: Tensor, name: str) -> None:
    """Passes silently, or says how many values are broken.

    Raises:
        NumericsError: the tensor holds NaN or infinity.
    """
    rows = tensor.detach() if tensor.dim() else tensor.detach().view(1)
    parts = torch.split(rows, max(1, _PART * len(rows) // max(1, rows.numel())))  # isfinite copies what it is given
    broken = rows.numel() - int(sum(part.isfinite().sum() for part in parts))
    if broken:
        raise NumericsError(
            f"the {name} {tuple(tensor.shape)} holds {broken} values that are NaN or infinite:"
            " check the checkpoint and the calibration samples"
        )
