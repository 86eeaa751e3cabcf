"""Low-rank factors that are best on the layer's own inputs (SVD-LLM, arXiv 2403.07378; CASP, arXiv 2503.05936).

With H = L L^T the second moment of the inputs and W L = U diag(S) V^T,

    A = U_R sqrt(S_R),   B = sqrt(S_R) V_R^T L^-1   minimise   tr((W - A B) H (W - A B)^T) = sum_{i > R} S_i^2.

Letters: O out, I in, R rank, M = min(O, I).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from casp_pl.linalg.cholesky import safe_cholesky
from casp_pl.linalg.finite import require_finite

__all__ = ["WhitenedSVD", "low_rank_factors", "whitened_spectrum", "whitened_svd"]


class WhitenedSVD(NamedTuple):
    """W L = U diag(S) Vt, everything in float64.

    Attributes:
        U: (O, M).
        S: (M,), descending; sum_{i > R} S_i^2 is the proxy loss that rank R leaves.
        Vt: (M, I).
        chol: L (I, I), lower.
    """

    U: Tensor
    S: Tensor
    Vt: Tensor
    chol: Tensor


def whitened_svd(weight: Tensor, second_moment: Tensor, damping: float = 1e-6) -> WhitenedSVD:
    """SVD of W L.

    Args:
        weight: (O, I).
        second_moment: H (I, I).
        damping: added to H, relative to the mean of its diagonal.

    Raises:
        NumericsError: NaN or infinity in one of the two.
    """
    whitened, factor = _whitened(weight, second_moment, damping)
    left, values, right = torch.linalg.svd(whitened, full_matrices=False)
    return WhitenedSVD(left, values, right, factor)


def whitened_spectrum(weight: Tensor, second_moment: Tensor, damping: float = 1e-6) -> Tensor:
    """S (M,) of `whitened_svd` alone, in half of its time."""
    values: Tensor = torch.linalg.svdvals(_whitened(weight, second_moment, damping)[0])
    return values


def _whitened(weight: Tensor, second_moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """W L (O, I) and L (I, I)."""
    require_finite(weight, "weight")
    factor, _ = safe_cholesky(second_moment, damping)
    return weight.detach().to(torch.float64) @ factor, factor


def low_rank_factors(svd: WhitenedSVD, rank: int) -> tuple[Tensor, Tensor]:
    """The factors A (O, R) and B (R, I) in float64. A rank above min(O, I) is cut to it, where A B = W exactly.

    Raises:
        ValueError: a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"a low-rank layer needs a rank of at least 1, not {rank}")
    root = svd.S[:rank].sqrt()
    outer = svd.U[:, :rank] * root
    whitened = root.unsqueeze(1) * svd.Vt[:rank]
    inner = torch.linalg.solve_triangular(svd.chol, whitened, upper=False, left=False)
    return outer, inner
