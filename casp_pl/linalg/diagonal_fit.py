"""The best diagonal factors of an approximate weight, in closed form.

They minimise tr(E H E^T) with E = W - diag(s) V diag(t) over s or over t, the other one being all ones.
Letters: O out, I in.
"""

import torch
from torch import Tensor

from casp_pl.linalg.cholesky import safe_cholesky, solve_factored

__all__ = ["best_column_factors", "best_row_factors"]

_STRIP = 512  # rows at a time
_RIDGE = 1e-6  # of the mean diagonal: pulls factors of columns that nothing depends on to 1


def best_row_factors(weight: Tensor, approx: Tensor, moment: Tensor) -> Tensor:
    """s_o = (w_o H v_o) / (v_o H v_o); 1 where v_o is 0.

    Args:
        weight: W (O, I).
        approx: V (O, I).
        moment: H (I, I).

    Returns:
        s (O,).
    """
    seen = approx @ moment
    energy = torch.linalg.vecdot(seen, approx)
    return torch.where(energy > 0, torch.linalg.vecdot(seen, weight) / energy, 1.0)


def best_column_factors(weight: Tensor, approx: Tensor, moment: Tensor) -> Tensor:
    """The solution t (I,) of ((V^T V) * H) t = diag(V^T W H), in float64. Arguments as above, but H is used up."""
    right = (weight @ moment).mul_(approx).sum(dim=0, dtype=torch.float64)
    left = moment  # one matrix less: half a gigabyte at I = 11008
    for start in range(0, len(left), _STRIP):
        rows = slice(start, start + _STRIP)
        left[rows].mul_(approx[:, rows].T @ approx)
    if not left.diagonal().any():
        return torch.ones_like(right)
    ridge = _RIDGE * left.diagonal().mean(dtype=torch.float64)
    factor, _ = safe_cholesky(left, _RIDGE)
    return solve_factored((right + ridge)[:, None], factor)[:, 0]
