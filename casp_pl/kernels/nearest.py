"""The hottest operation of additive quantization: which codebook entry lies nearest, for many vectors at once.

Letters: C codebook entries, D group length, N vectors.
"""

import torch
from torch import Tensor

__all__ = ["nearest_entries", "nearest_entries_reference"]

_BRANCH = 16  # entries a first-level minimum covers; two levels of 16 fit a codebook of 256
_MAX_SCORES = 1 << 22  # scores held at once (16 MiB in float32)


def nearest_entries_reference(linear: Tensor, codebook: Tensor, norms: Tensor) -> Tensor:
    """`nearest_entries` written down directly, the oracle of its test."""
    return (norms[:, None] - 2 * codebook @ linear).argmin(dim=0)


def nearest_entries(linear: Tensor, codebook: Tensor, norms: Tensor) -> Tensor:
    """argmin_c norms_c - 2 <codebook_c, linear_n>: the nearest entry in the metric M when linear = M x and norms = c^T M c.

    On a CPU torch's argmin costs ten times the scores themselves, its amin (vectorised) a tenth of argmin: so take amin over runs of
    16 entries, then the argmin over the few runs and over the entries of the winning run. The result is exact.

    Args:
        linear: (D, N), the vectors, already multiplied by the metric.
        codebook: (C, D).
        norms: (C,), squared lengths of the entries in the metric.

    Returns:
        (N,) int64 indices of entries; of equal scores the first.
    """
    entries, vectors = codebook.shape[0], linear.shape[1]
    table = torch.cat([codebook * -2, norms[:, None]], dim=1)
    vectors_and_one = torch.cat([linear, linear.new_ones(1, vectors)])
    parts = vectors_and_one.split(max(1, _MAX_SCORES // entries), dim=1)
    chosen = [_argmin_of_columns(table @ part) for part in parts]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen)


def _argmin_of_columns(scores: Tensor) -> Tensor:
    """(C, N) -> (N,), the row of the smallest score of every column."""
    entries, columns = scores.shape
    if scores.is_cuda or entries % _BRANCH or entries < 2 * _BRANCH:
        return scores.min(dim=0).indices
    runs = scores.view(entries // _BRANCH, _BRANCH, columns)
    run = runs.amin(dim=1).min(dim=0).indices
    inside = runs.gather(0, run.expand(1, _BRANCH, columns))[0].min(dim=0).indices
    return run * _BRANCH + inside
