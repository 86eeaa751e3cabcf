"""k-means in which every position has its own metric: an error e at position g costs e^T metrics[g] e.

AQLM starts its codebooks by plain k-means (arXiv 2401.06118); in the metric of the output error the
entries lie where inputs are large.

Letters: C entries (centroids), D length of a vector, G positions (groups of a row), N vectors a position.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from casp_pl.kernels.nearest import nearest_entries

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


def update_centroids(weighted: Tensor, metrics: Tensor, nearest: Tensor, centroids: Tensor) -> Tensor:
    """The best centroids for fixed assignments: (sum_g n_cg M_g) c = sum of M_g x over the vectors x that chose c.

    Entries that nobody chose stay.

    Args:
        weighted: (G, D, N), metrics @ vectors.
        metrics: (G, D, D), symmetric and positive semidefinite.
        nearest: (G, N), the entry of every vector.
        centroids: (C, D), the entries so far.

    Returns:
        (C, D) centroids.
    """
    entries, length = centroids.shape
    positions = metrics.shape[0]
    keys = nearest + entries * torch.arange(positions, device=nearest.device)[:, None]
    counts = torch.bincount(keys.flatten(), minlength=positions * entries).view(positions, entries).to(metrics.dtype)
    left = (counts.T @ metrics.flatten(1)).view(entries, length, length)
    right = torch.zeros_like(centroids).index_add_(0, nearest.flatten(), weighted.transpose(1, 2).reshape(-1, length))
    ridge = _RIDGE * left.diagonal(dim1=1, dim2=2).mean(dim=1)
    used = ridge > 0
    eye = torch.eye(length, dtype=left.dtype, device=left.device)
    left = torch.where(used[:, None, None], left + ridge[:, None, None] * eye, eye)
    solved = torch.linalg.solve(left, right + ridge[:, None] * centroids)  # the ridge pulls to the centroid so far
    return torch.where(used[:, None], solved, centroids)


def metric_kmeans(
    vectors: Tensor,
    metrics: Tensor,
    entries: int,
    *,
    iterations: int,
    generator: torch.Generator,
    assign: Callable[[Tensor, Tensor, Tensor], Tensor] = assign_entries,
) -> Tensor:
    """k-means of vectors under the metric of their position, started from vectors drawn at random.

    Args:
        vectors: (G, D, N), N vectors at each of G positions.
        metrics: (G, D, D), symmetric and positive semidefinite.
        entries: C, the number of centroids; where that is more than G * N, some are equal.
        iterations: rounds of assignment and update.
        generator: draws the start.
        assign: does what `assign_entries` does.

    Returns:
        (C, D) centroids.
    """
    pool = vectors.transpose(1, 2).reshape(-1, vectors.shape[1])
    start = torch.randperm(len(pool), generator=generator, device=generator.device).to(pool.device)
    centroids = pool[start.repeat(-(-entries // len(pool)))[:entries]]
    weighted = metrics @ vectors
    for _ in range(iterations):
        nearest = assign(weighted, centroids, metrics)
        centroids = update_centroids(weighted, metrics, nearest, centroids)
    return centroids
