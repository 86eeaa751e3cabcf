"""What a layer behind a compressed prefix should aim at (QEP, arXiv 2504.09629; GPTAQ, arXiv 2504.02692).

The layer sees inputs x_q, the original layer saw x. The weight that repeats the original's output on what it sees, in
the least squares sense, is W C H^-1 with C = sum x x_q^T and H = sum x_q x_q^T. Letters: O out, I in.
"""

import torch
from torch import Tensor

from casp_pl.linalg.cholesky import safe_cholesky, solve_factored
from casp_pl.linalg.finite import require_finite

__all__ = ["PropagationTarget"]

_ROWS = 512  # of a weight at a time, and of C: float64 copies of large ones would be a gigabyte each


class PropagationTarget:
    """W' = W + alpha (W C H^-1 - W), for all weights that read one input. With equal moments, or alpha 0, it is W.

    Args:
        cross_moment: C (I, I), sum of (input in the original model) (input here)^T over tokens; not symmetric.
        second_moment: H (I, I), sum of (input here) (input here)^T over the same tokens; factorised once.
        alpha: 0 keeps the original weight, 1 corrects in full.
        damping: added to both diagonals, relative to the mean of H's.

    Raises:
        NumericsError: NaN or infinity in a moment.
    """

    def __init__(self, cross_moment: Tensor, second_moment: Tensor, alpha: float, damping: float = 1e-2) -> None:
        require_finite(cross_moment, "cross moment")
        self.alpha = alpha
        self._factor, self._jitter = safe_cholesky(second_moment, damping)
        self._cross = cross_moment

    def of(self, weight: Tensor) -> Tensor:
        """W' (O, I) of a weight W (O, I), in its dtype."""
        return torch.cat([self._of_rows(rows) for rows in torch.split(weight.detach(), _ROWS)])

    def _of_rows(self, weight: Tensor) -> Tensor:
        wide = weight.to(torch.float64)
        # W C + jitter W = W (C + jitter I), so equal moments give W back exactly whatever the jitter.
        damped = self._jitter * wide
        for part, cross in zip(torch.split(wide, _ROWS, dim=1), torch.split(self._cross, _ROWS), strict=True):
            damped.addmm_(part, cross.to(torch.float64))
        corrected = solve_factored(damped.T, self._factor).T
        return torch.lerp(wide, corrected, self.alpha).to(weight.dtype)
