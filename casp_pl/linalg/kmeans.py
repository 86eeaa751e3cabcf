"""k-means in which every position has its own metric: an error e at position g costs e^T metrics[g] e.

AQLM starts its codebooks by plain k-means (arXiv 2401.06118); in the metric of the output error the
entries lie where inputs are large.

Letters: C entries (centroids), D length of a vector, G positions (groups of a row), N vectors a position.
"""

from itertools import pairwise

import torch
from torch import Tensor

from casp_pl.kernels.nearest import nearest_entries
from casp_pl.processes import RowShare

__all__ = ["assign_entries", "metric_kmeans", "metric_norms", "update_centroids"]

_RIDGE = 1e-4  # of the mean diagonal of a centroid's metric: keeps the DxD solves regular where a metric is singular


def metric_norms(centroids: Tensor, metrics: Tensor) -> Tensor:
    """c^T M_g c of every entry at every position: centroids (C, D), metrics (G, D, D) -> (G, C)."""
    return ((centroids @ metrics) * centroids).sum(dim=2)


def assign_entries(weighted: Tensor, centroids: Tensor, metrics: Tensor) -> Tensor:
    """Nearest entry of every vector.

    Args:
        weighted: metrics @ vectors (G, D, N).
        centroids: (C, D).
        metrics: (G, D, D).

    Returns:
        (G, N) int64.
    """
    return nearest_entries(weighted, centroids, metric_norms(centroids, metrics))


def update_centroids(
    weighted: Tensor, metrics: Tensor, nearest: Tensor, centroids: Tensor, share: RowShare | None = None
) -> Tensor:
    """The best centroids for fixed assignments: (sum_g n_cg M_g) c = sum of M_g x over the vectors x that chose c.

    Entries that nobody chose stay.

    Args:
        weighted: (G, D, N), metrics @ vectors.
        metrics: (G, D, D), symmetric and positive semidefinite.
        nearest: (G, N), the entry of every vector.
        centroids: (C, D), the entries so far.
        share: of the positions, where the G above are those of this process alone.

    Returns:
        (C, D) centroids.
    """
    entries, length = centroids.shape
    share = RowShare(len(metrics)) if share is None else share
    parts = [slice(start, stop) for start, stop in pairwise(share.bounds)]
    sums = [_sums_of_members(weighted[part], metrics[part], nearest[part], entries) for part in parts]
    total = share.sum(torch.stack(sums))
    left, right = total[:, :length], total[:, length]
    ridge = _RIDGE * left.diagonal(dim1=1, dim2=2).mean(dim=1)
    used = ridge > 0
    eye = torch.eye(length, dtype=left.dtype, device=left.device)
    left = torch.where(used[:, None, None], left + ridge[:, None, None] * eye, eye)
    solved = torch.linalg.solve(left, right + ridge[:, None] * centroids)  # the ridge pulls to the centroid so far
    return torch.where(used[:, None], solved, centroids)


def _sums_of_members(weighted: Tensor, metrics: Tensor, nearest: Tensor, entries: int) -> Tensor:
    """By entry the sum of M_g over its members, and below it that of M_g x (C, D + 1, D)."""
    positions, length = metrics.shape[:2]
    keys = nearest + entries * torch.arange(positions, device=nearest.device)[:, None]
    counts = torch.bincount(keys.flatten(), minlength=positions * entries).view(positions, entries).to(metrics.dtype)
    sums = torch.cat([counts.T @ metrics.flatten(1), metrics.new_zeros(entries, length)], dim=1)
    sums[:, length**2 :].index_add_(0, nearest.flatten(), weighted.transpose(1, 2).reshape(-1, length))
    return sums.view(entries, length + 1, length)


def metric_kmeans(
    vectors: Tensor,
    metrics: Tensor,
    entries: int,
    *,
    iterations: int,
    generator: torch.Generator,
    share: RowShare | None = None,
) -> Tensor:
    """k-means of vectors under the metric of their position, started from vectors drawn at random.

    Args:
        vectors: (G, D, N), N vectors at each of G positions.
        metrics: (G, D, D), symmetric and positive semidefinite.
        entries: C, the number of centroids; where that is more than G * N, some are equal.
        iterations: rounds of assignment and update.
        generator: draws the start.
        share: of the positions, where processes that all have the same vectors share the work.

    Returns:
        (C, D) centroids.
    """
    pool = vectors.transpose(1, 2).reshape(-1, vectors.shape[1])
    start = torch.randperm(len(pool), generator=generator, device=generator.device).to(pool.device)
    centroids = pool[start.repeat(-(-entries // len(pool)))[:entries]]
    share = RowShare(len(metrics)) if share is None else share
    metrics = metrics[share.own]
    weighted = metrics @ vectors[share.own]
    for _ in range(iterations):
        nearest = assign_entries(weighted, centroids, metrics)
        centroids = update_centroids(weighted, metrics, nearest, centroids, share)
    return centroids
