"""One check for values that no maths survives."""

from torch import Tensor

from casp_pl.errors import NumericsError

__all__ = ["require_finite"]


def require_finite(tensor: Tensor, name: str) -> None:
    """Passes silently, or says how many values are broken.

    Raises:
        NumericsError: the tensor holds NaN or infinity.
    """
    broken = tensor.numel() - int(tensor.isfinite().sum())
    if broken:
        raise NumericsError(
            f"the {name} {tuple(tensor.shape)} holds {broken} values that are NaN or infinite:"
            " check the checkpoint and the calibration samples"
        )
