"""One safe Cholesky for everything that factorises a second moment. Letter: I in (any square size)."""

import logging

import torch
from torch import Tensor

from casp_pl.errors import NumericsError
from casp_pl.linalg.finite import require_finite

__all__ = ["safe_cholesky", "solve_factored"]

_logger = logging.getLogger(__name__)

_FIRST_JITTER = 1e-8
_LAST_JITTER = 1e6


def safe_cholesky(matrix: Tensor, damping: float = 0.0) -> tuple[Tensor, float]:
    """Lower Cholesky factor in float64 of matrix + jitter * identity.

    The jitter starts at `damping` and grows tenfold until the factorisation succeeds; what exceeds `damping` is
    logged. Both are relative to the mean of the absolute diagonal; a zero matrix counts as having a diagonal of ones.
    After the idea of linear_operator's psd_safe_cholesky.

    Args:
        matrix: symmetric (I, I), any float dtype; only the lower triangle is read.
        damping: relative, at least 0.

    Returns:
        The factor (I, I), and the absolute value that was added to the diagonal.

    Raises:
        NumericsError: NaN or infinity in the matrix, or no jitter helps.
    """
    require_finite(matrix, "second moment")
    diagonal = matrix.detach().diagonal().to(torch.float64)
    unit = float(diagonal.abs().mean()) or 1.0
    # by columns, as LAPACK wants it: then the factor takes the matrix's place, 1 GB at I = 11008
    factor = torch.empty(matrix.shape, dtype=torch.float64, device=matrix.device).mT
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    relative = damping
    while relative <= max(_LAST_JITTER, damping):
        factor.copy_(matrix.detach())
        factor.diagonal().copy_(diagonal + relative * unit)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed.item():
            if relative > damping:
                shape = tuple(matrix.shape)
                _logger.warning("a second moment %s needed damping %.0e instead of %.0e", shape, relative, damping)
            return factor, relative * unit
        relative = max(10 * relative, _FIRST_JITTER)
    raise NumericsError(f"a second moment {tuple(matrix.shape)} is far from positive definite: it is not one")


def solve_factored(right: Tensor, factor: Tensor) -> Tensor:
    """(L L^T)^-1 R of a right side R (I, N) and a lower factor L (I, I); `torch.cholesky_solve` would copy L."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solved
