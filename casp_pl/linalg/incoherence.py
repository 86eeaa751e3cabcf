"""Weights and second moments in a basis where no coordinate stands out (QuIP#, arXiv 2402.04396, section 3).

With signs s_v over outputs, s_u over inputs and the orthogonal transforms U of `orthogonal.py`

    W~ = U_O diag(s_v) W diag(s_u) U_P^T,    H~ = U_P diag(s_u) H diag(s_u) U_P^T,

so that tr(W~ H~ W~^T) = tr(W H W^T). Letters: O out, I in, P >= I the padded width; padding comes before the transform.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from casp_pl.linalg.moments import symmetrize_
from casp_pl.linalg.orthogonal import transform_columns, transform_rows

__all__ = ["incoherent_moment", "incoherent_weight", "random_signs"]

_STRIP = 512  # rows or columns that are transformed at once


def random_signs(size: int, generator: torch.Generator, *, device: torch.device) -> Tensor:
    """Signs (size,), float32: +1 or -1 with equal probability."""
    coins = torch.randint(2, (size,), generator=generator, device=generator.device)
    return (2 * coins - 1).to(device, torch.float32)


def incoherent_weight(weight: Tensor, su: Tensor, sv: Tensor, width: int) -> Tensor:
    """W~ (O, P) of a weight (O, I), signs su (I,) and sv (O,), and width P."""
    padded = F.pad(weight * su * sv[:, None], (0, width - weight.shape[1]))
    return transform_columns(transform_rows(padded))


def incoherent_moment(second_moment: Tensor, su: Tensor, width: int) -> Tensor:
    """H~ (P, P), float64, of a second moment (I, I), signs su (I,) and width P; symmetric to the last bit."""
    mixed = second_moment.new_zeros(width, width, dtype=torch.float64)
    known = mixed[: len(su), : len(su)]
    known.copy_(second_moment).mul_(su).mul_(su[:, None])
    # in strips: whole, a transform would take three more of its size
    for rows in torch.split(mixed, _STRIP):
        rows.copy_(transform_rows(rows))
    for columns in torch.split(mixed, _STRIP, dim=1):
        columns.copy_(transform_columns(columns))
    return symmetrize_(mixed)
