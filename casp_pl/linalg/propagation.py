"""What a layer behind a compressed prefix should aim at (QEP, arXiv 2504.09629; GPTAQ, arXiv 2504.02692).

The layer sees inputs x_q, the original layer saw x. The weight that repeats the original's output on what it sees, in
the least squares sense, is W C H^-1 with C = sum x x_q^T and H = sum x_q x_q^T. Letters: O out, I in.
"""

import torch
from torch import Tensor

from casp_pl.linalg.cholesky import safe_cholesky
from casp_pl.linalg.finite import require_finite

__all__ = ["propagation_target"]


def propagation_target(
    weight: Tensor, cross_moment: Tensor, second_moment: Tensor, alpha: float, damping: float = 1e-2
) -> Tensor:
    """W' = W + alpha (W C H^-1 - W). With equal moments, or alpha 0, it is W.

    Args:
        weight: W (O, I).
        cross_moment: C (I, I), sum of (input in the original model) (input here)^T over tokens; not symmetric.
        second_moment: H (I, I), sum of (input here) (input here)^T over the same tokens.
        alpha: 0 keeps the original weight, 1 corrects in full.
        damping: added to both diagonals, relative to the mean of H's.

    Returns:
        W' (O, I) in the dtype of the weight.

    Raises:
        NumericsError: NaN or infinity in a moment.
    """
    require_finite(cross_moment, "cross moment")
    factor, jitter = safe_cholesky(second_moment, damping)
    wide = weight.detach().to(torch.float64)
    # W C + jitter W = W (C + jitter I), so equal moments give W back exactly whatever the jitter.
    damped = wide @ cross_moment.to(torch.float64) + jitter * wide
    corrected = torch.cholesky_solve(damped.T, factor).T
    return torch.lerp(wide, corrected, alpha).to(weight.dtype)
