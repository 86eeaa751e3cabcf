"""The hottest operation of additive quantization: which codebook entries lie nearest, for many vectors at once.

Distances are taken in a metric M: with linear = M x and norms_c = c^T M c, |x - c|_M^2 is norms_c - 2 <c, linear> plus
a constant. On a CPU torch's argmin takes ten times as long as the scores themselves and its vectorised amin a tenth of
argmin, so indices are looked for as late as possible and among as few scores as possible.

Letters: C codebook entries, D group length, N vectors, G groups of them, B runs of a codebook.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.profiler import record_function

from casp_pl.kernels.compiled import search_loops

__all__ = ["argmin_of_columns", "best_of_runs", "nearest_entries", "nearest_entries_reference", "nearest_scores"]

_RUNS = 16
_MAX_SCORES = 1 << 17  # scores held at once: half a MiB in float32 stays in a core's cache


def nearest_entries_reference(linear: Tensor, codebook: Tensor, norms: Tensor) -> Tensor:
    """`nearest_entries` written down directly, the oracle of its test."""
    return (norms[..., None] - 2 * codebook @ linear).argmin(dim=-2)


def nearest_entries(linear: Tensor, codebook: Tensor, norms: Tensor) -> Tensor:
    """The nearest entry of every vector; of equal ones the first.

    Args:
        linear: M x (D, N), or (G, D, N) of groups with metrics of their own.
        codebook: (C, D).
        norms: c^T M c (C,), or (G, C).

    Returns:
        Indices of entries (N,) or (G, N), int64.
    """
    if linear.dim() == 2:
        return nearest_entries(linear[None], codebook, norms[None])[0]
    if (loops := search_loops(linear)) is None:
        return torch.stack([_nearest(*group, codebook) for group in zip(linear, norms, strict=True)])
    entries = torch.empty(len(linear), linear.shape[2], dtype=torch.int64, device=linear.device)
    with record_function("casp_pl::nearest_entries"):
        loops.nearest_entries(linear, codebook.T, norms, entries)
    return entries


def _nearest(linear: Tensor, norms: Tensor, codebook: Tensor) -> Tensor:
    return torch.cat([argmin_of_columns(scores) for scores in _scores(linear, codebook, norms)])


def nearest_scores(linear: Tensor, codebook: Tensor, norms: Tensor) -> Tensor:
    """The score norms_c - 2 <c, linear> of the nearest entry (N,), at a third of the time of `nearest_entries`."""
    return torch.cat([scores.amin(dim=0) for scores in _scores(linear, codebook, norms)])


def best_of_runs(linear: Tensor, codebook: Tensor, norms: Tensor, runs: int) -> tuple[Tensor, Tensor]:
    """Candidates for a beam: the nearest entry of each of B runs of the codebook. The overall nearest is among them.

    Args:
        linear: M x (D, N).
        codebook: (C, D).
        norms: c^T M c (C,).
        runs: B, a divisor of C.

    Returns:
        Indices of entries (B, N), int64, and their scores (B, N), in the order of the runs.
    """
    length = len(codebook) // runs
    parts = [scores.view(runs, length, -1).min(dim=1) for scores in _scores(linear, codebook, norms)]
    values, inside = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
    return inside + length * torch.arange(runs, device=inside.device)[:, None], values


def argmin_of_columns(scores: Tensor) -> Tensor:
    """Row of the smallest score of every column, (C, N) -> (N,) int64.

    Minima of 16 runs first, then the argmin among them and the argmin inside the winning run.
    """
    entries, columns = scores.shape
    length = entries // _RUNS
    if scores.is_cuda or entries % _RUNS or length < 2:
        return scores.min(dim=0).indices
    runs = scores.view(_RUNS, length, columns)
    run = runs.amin(dim=1).min(dim=0).indices
    inside = runs.gather(0, run.expand(1, length, columns))[0].min(dim=0).indices
    return run * length + inside


def _scores(linear: Tensor, codebook: Tensor, norms: Tensor) -> Iterator[Tensor]:
    """Scores (C, N) in parts of columns that fit a cache."""
    table = torch.cat([codebook * -2, norms[:, None]], dim=1)
    extended = torch.cat([linear, linear.new_ones(1, linear.shape[1])])
    return (table @ part for part in torch.split(extended, max(1, _MAX_SCORES // len(codebook)), dim=1))
