"""k-means in metrics against brute force, a dense solve, and the textbook special case."""

import pytest
import torch
from torch import Tensor

from casp_pl.linalg.kmeans import assign_entries, metric_kmeans, update_centroids


def _problem(groups: int, length: int, vectors: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(groups, length, 2 * length, generator=generator)
    return torch.randn(groups, length, vectors, generator=generator), roots @ roots.mT / length


def _distances(vectors: Tensor, metrics: Tensor, centroids: Tensor) -> Tensor:
    """e^T M e of every vector and centroid, the slow way: (G, N, C)."""
    errors = vectors.mT[:, :, None] - centroids
    return torch.einsum("gncd,gde,gnce->gnc", errors, metrics, errors)


def test_assignment_is_the_brute_force_argmin() -> None:
    vectors, metrics = _problem(3, 5, 41)
    centroids = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
    expected = _distances(vectors, metrics, centroids).argmin(dim=2)
    assert torch.equal(assign_entries(metrics @ vectors, centroids, metrics), expected)


def test_centroids_are_the_minimum_of_their_members() -> None:
    vectors, metrics = _problem(4, 3, 50)
    centroids = torch.randn(8, 3, generator=torch.Generator().manual_seed(2))
    nearest = assign_entries(metrics @ vectors, centroids, metrics)
    nearest[nearest == 5] = 4  # entry 5 has no members and stays
    updated = update_centroids(metrics @ vectors, metrics, nearest, centroids)
    for entry in range(8):
        members = [(g, n) for g, n in (nearest == entry).nonzero().tolist()]
        left = sum((metrics[g].double() for g, _ in members), torch.zeros(3, 3, dtype=torch.float64))
        right = sum((metrics[g].double() @ vectors[g, :, n].double() for g, n in members), torch.zeros(3).double())
        expected = torch.linalg.solve(left, right) if members else centroids[entry].double()
        torch.testing.assert_close(updated[entry].double(), expected, rtol=2e-3, atol=2e-3)


def test_every_round_lowers_the_cost() -> None:
    vectors, metrics = _problem(6, 4, 200)
    costs = []
    for iterations in range(6):
        generator = torch.Generator().manual_seed(3)
        centroids = metric_kmeans(vectors, metrics, 16, iterations=iterations, generator=generator)
        costs.append(float(_distances(vectors, metrics, centroids).amin(dim=2).sum()))
    assert all(later < earlier for earlier, later in zip(costs, costs[1:], strict=False))


def test_separated_clusters_are_found_in_the_plain_metric() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    generator = torch.Generator().manual_seed(0)
    points = (centres[:, None] + 0.1 * torch.randn(4, 50, 2, generator=generator)).view(-1, 2)
    best = torch.tensor(float("inf"))
    for _ in range(8):  # k-means from random points may merge two clusters; one of a few starts does not
        found = metric_kmeans(points.T[None], torch.eye(2)[None], 4, iterations=10, generator=generator)
        best = torch.minimum(best, torch.cdist(centres, found).amin(dim=1).max())
    assert best < 0.1


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_fewer_vectors_than_entries_and_empty_metrics(scale: float) -> None:
    vectors, metrics = _problem(2, 4, 3)
    centroids = metric_kmeans(vectors, scale * metrics, 16, iterations=3, generator=torch.Generator().manual_seed(0))
    assert centroids.shape == (16, 4)
    assert centroids.isfinite().all()
    if scale:
        assert _distances(vectors, metrics, centroids).amin(dim=2).max() < 1e-4
