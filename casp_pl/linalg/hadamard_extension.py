"""The package fast-hadamard-transform, where it is installed and works. Letter: n the width, a power of two.

Its source archive lacks the CUDA part, so it may install and fail at import, or import and fail at the first call: it
is used on a device only after it gave the right numbers there.
"""

import logging
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from casp_pl.linalg.hadamard import hadamard_matrix

__all__ = ["extension_name", "extension_transform", "runs_extension", "takes_extension"]

_logger = logging.getLogger(__name__)
_TRIAL_WIDTH = 64
_MOST_WIDTH = 32768  # its largest kernel
_TRIED = ("cuda",)  # types of devices that it is tried on; it has nothing for others


@lru_cache(maxsize=64)
def runs_extension(device: torch.device) -> bool:
    """Whether the package is there and gives the right numbers on this device; asked once, the answer is logged."""
    if device.type not in _TRIED:
        return False
    x = torch.linspace(-1, 1, _TRIAL_WIDTH, dtype=torch.float32, device=device)
    matrix = hadamard_matrix(_TRIAL_WIDTH).to(device, x.dtype) / _TRIAL_WIDTH**0.5
    try:
        works = torch.allclose(extension_transform(x[None])[0], matrix @ x, atol=1e-4)
        reason = "" if works else ": it gives wrong numbers"
    except Exception as error:  # a broken build raises whatever it likes, from ImportError to RuntimeError
        works, reason = False, f": {error}"
    _logger.info("fast_hadamard_transform is %s on %s%s", "used" if works else "not used", device, reason)
    return works


def takes_extension(width: int, dtype: torch.dtype) -> bool:
    """Whether the package has a kernel for such vectors; others it refuses, or pads."""
    return width & (width - 1) == 0 and width <= _MOST_WIDTH and dtype == torch.float32


def extension_name() -> str:
    """The package with its version, for people."""
    try:
        return f"fast-hadamard-transform {version('fast-hadamard-transform')}"
    except PackageNotFoundError:  # a copy that was not installed
        return "fast-hadamard-transform"


def extension_transform(x: Tensor) -> Tensor:
    """Sylvester's Hadamard matrix over sqrt(n) times every vector of x (..., n)."""
    from fast_hadamard_transform import hadamard_transform

    result: Tensor = hadamard_transform(x, scale=x.shape[-1] ** -0.5)
    return result
