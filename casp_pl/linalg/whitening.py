"""Low-rank factors that are best on the layer's own inputs (SVD-LLM, arXiv 2403.07378; CASP, arXiv 2503.05936).

With H = L L^T the second moment of the inputs and W L = U diag(S) V^T,

    A = U_R sqrt(S_R),   B = sqrt(S_R) V_R^T L^-1   minimise   tr((W - A B) H (W - A B)^T) = sum_{i > R} S_i^2.

Neither L nor V is needed. U and S^2 are the eigenvectors and eigenvalues of the outputs' second moment W H W^T, and
V_R^T L^-1 is S_R^-1 U_R^T W, so that

    B = U_R^T W / sqrt(S_R),   A B = U_R U_R^T W,

the projection of W onto the directions in which the outputs vary most. An eigendecomposition takes half the time of a
singular value decomposition, and a Cholesky factor of a poor H is one more thing that could fail. S^2 is exact to 1e-16
of the largest, far below what float32 moments know of it. Letters: O out, I in, R rank, M = min(O, I).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from casp_pl.linalg.finite import require_finite

__all__ = ["WhitenedSVD", "low_rank_factors", "whitened_spectrum", "whitened_svd"]

_FLOOR = 1e-9  # of the largest S: below are roundings, and directions that the inputs do not reach


class WhitenedSVD(NamedTuple):
    """U and S of W L, in float64.

    Attributes:
        U: (O, M).
        S: (M,), descending; sum_{i > R} S_i^2 is the proxy loss that rank R leaves.
    """

    U: Tensor
    S: Tensor


def whitened_svd(weight: Tensor, second_moment: Tensor, damping: float = 1e-6) -> WhitenedSVD:
    """U and S of W L.

    Args:
        weight: (O, I).
        second_moment: H (I, I).
        damping: added to H, relative to the mean of its diagonal; to a zero matrix as if that were 1.

    Raises:
        NumericsError: NaN or infinity in one of the two.
    """
    energies, directions = torch.linalg.eigh(_output_moment(weight, second_moment, damping))
    most = min(weight.shape)
    return WhitenedSVD(directions.flip(1)[:, :most], _roots(energies)[:most])


def whitened_spectrum(weight: Tensor, second_moment: Tensor, damping: float = 1e-6) -> Tensor:
    """S (M,) of `whitened_svd` alone, in half of its time."""
    return _roots(torch.linalg.eigvalsh(_output_moment(weight, second_moment, damping)))[: min(weight.shape)]


def _output_moment(weight: Tensor, second_moment: Tensor, damping: float) -> Tensor:
    """W (H + jitter) W^T (O, O) in float64."""
    require_finite(weight, "weight")
    require_finite(second_moment, "second moment")
    wide, moment = weight.detach().to(torch.float64), second_moment.detach().to(torch.float64, copy=True)
    diagonal = moment.diagonal()
    diagonal.add_(damping * (float(diagonal.abs().mean()) or 1.0))
    return wide @ moment @ wide.T


def _roots(ascending: Tensor) -> Tensor:
    return ascending.flip(0).clamp_min(0).sqrt()


def low_rank_factors(weight: Tensor, svd: WhitenedSVD, rank: int) -> tuple[Tensor, Tensor]:
    """The factors A (O, R) and B (R, I) in float64. A rank above min(O, I) is cut to it, where A B = W exactly.

    Args:
        weight: W (O, I).
        svd: of this weight.
        rank: R.

    Raises:
        ValueError: a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"a low-rank layer needs a rank of at least 1, not {rank}")
    # the floor only shares the sizes of A and B out in another way where S is a rounding: A B is the same
    values = svd.S[:rank].clamp_min(_FLOOR * float(svd.S[0]))
    root, directions = values.sqrt(), svd.U[:, :rank]
    inner = directions.T @ weight.detach().to(torch.float64)
    return directions * root, inner / root.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
