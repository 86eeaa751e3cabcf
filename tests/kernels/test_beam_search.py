"""The beam search, compiled and in torch, against exhaustive search and against each other, at even and odd sizes."""

import itertools

import pytest
import torch
from torch import Tensor

from casp_pl.kernels.beam_search import (
    beam_search,
    beam_search_reference,
    improve_codes,
    improve_codes_reference,
    sum_of_entries,
)
from casp_pl.kernels.compiled import search_loops


def _problem(codebooks: int, entries: int, length: int, vectors: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (D, O), M (D, D), codebooks (K, C, D) and their norms and images."""
    generator = torch.Generator().manual_seed(entries + vectors)
    books = torch.randn(codebooks, entries, length, generator=generator)
    root = torch.randn(length, length, generator=generator)
    metric = root @ root.T + 0.1 * torch.eye(length)
    images = (books @ metric).transpose(1, 2).contiguous()
    norms = (images.transpose(1, 2) * books).sum(2)
    return torch.randn(length, vectors, generator=generator), metric, books, norms, images


def _score(x: Tensor, metric: Tensor, books: Tensor, codes: Tensor) -> Tensor:
    """|x - sum|_M^2 - |x|_M^2 of every vector."""
    total = sum(books[k][codes[k]].T for k in range(len(books)))
    return ((x - total) * (metric @ (x - total))).sum(0) - (x * (metric @ x)).sum(0)


SIZES = [(1, 256, 8, 33), (2, 256, 8, 577), (3, 64, 8, 1), (4, 16, 5, 70), (2, 2, 1, 9), (3, 256, 3, 31)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("width", [1, 4, 16])
def test_both_paths_find_the_same_sums(sizes: tuple[int, int, int, int], width: int) -> None:
    x, metric, books, norms, images = _problem(*sizes)
    codes, scores = beam_search(metric @ x, books, norms, images, width)
    others, expected = beam_search_reference(metric @ x, books, norms, images, width)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(_score(x, metric, books, codes), scores, rtol=1e-3, atol=1e-3)
    assert (codes == others).float().mean() > 0.99  # equal but for ties in rounding


def test_a_beam_of_all_partial_sums_is_exhaustive() -> None:
    x, metric, books, norms, images = _problem(2, 8, 4, 21)
    for search in (beam_search, beam_search_reference):
        _, scores = search(metric @ x, books, norms, images, 8)
        pairs = itertools.product(range(8), range(8))
        every = torch.stack([_score(x, metric, books, torch.tensor(pair)[:, None].expand(2, 21)) for pair in pairs])
        torch.testing.assert_close(scores, every.amin(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", SIZES)
def test_codes_are_improved_alike_and_by_what_is_said(sizes: tuple[int, int, int, int]) -> None:
    x, metric, books, norms, images = _problem(*sizes)
    generator = torch.Generator().manual_seed(9)
    scales = torch.rand(x.shape[1], generator=generator) + 0.5
    scales[1:2] = 0  # of a row that is all zeros
    start = torch.randint(0, books.shape[1], (len(books), x.shape[1]), generator=generator)
    error = (x - sum_of_entries(books, start)) * scales

    def loss(error: Tensor) -> Tensor:
        return (error * (metric @ error)).sum(0)

    results = []
    for improve in (improve_codes, improve_codes_reference):
        codes, fall = start.clone(), torch.ones(x.shape[1])
        change = improve(metric @ error, scales, books, norms, images, 4, codes, fall)
        expected = (sum_of_entries(books, codes) - sum_of_entries(books, start)) * scales
        torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fall - 1, loss(error) - loss(error - change), rtol=1e-3, atol=1e-3)
        assert (fall > 1 - 1e-4).all()
        results.append(codes)
    same = (results[0] == results[1]).all(0) | (scales == 0)
    assert same.float().mean() > 0.98  # equal but for ties in rounding
    assert (results[0] != start).any()


def test_float64_and_other_devices_stay_with_torch() -> None:
    assert search_loops(torch.empty(1, dtype=torch.float64)) is None
    assert search_loops(torch.empty(1, device="meta")) is None
    assert search_loops(torch.empty(1)) is not None, "the tests run with the extra `cpu`"
