"""The hottest search against the formula written down, at even and odd sizes."""

import pytest
import torch

from casp_pl.kernels.nearest import best_of_runs, nearest_entries, nearest_entries_reference, nearest_scores


def _problem(entries: int, length: int, vectors: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(entries + vectors)
    draw = [torch.randn(*shape, generator=generator) for shape in ((length, vectors), (entries, length), (entries,))]
    return draw[0], draw[1], draw[2].square()


@pytest.mark.parametrize("entries", [2, 8, 16, 32, 64, 256])
@pytest.mark.parametrize("vectors", [1, 13, 1111])
def test_nearest_entry_is_the_argmin(entries: int, vectors: int) -> None:
    linear, codebook, norms = _problem(entries, 5, vectors)
    expected = nearest_entries_reference(linear, codebook, norms)
    scores = norms[:, None] - 2 * codebook @ linear
    assert torch.equal(nearest_entries(linear, codebook, norms), expected)
    torch.testing.assert_close(nearest_scores(linear, codebook, norms), scores.amin(dim=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # compiled, and by torch
def test_groups_have_norms_of_their_own(dtype: torch.dtype) -> None:
    problems = [_problem(16, 5, vectors) for vectors in (70, 71, 72)]
    linear, norms = torch.stack([p[0][:, :70] for p in problems]).to(dtype), torch.stack([p[2] for p in problems])
    codebook, norms = problems[0][1].to(dtype), norms.to(dtype)
    found = nearest_entries(linear, codebook, norms)
    assert torch.equal(found, nearest_entries_reference(linear, codebook, norms))
    assert len({tuple(own.tolist()) for own in found}) == 3


def test_of_equal_entries_the_first_is_taken() -> None:
    linear, codebook, norms = _problem(64, 4, 33)
    twice, norms_twice = codebook[:32].repeat(2, 1), norms[:32].repeat(2)
    assert nearest_entries(linear, twice, norms_twice).max() < 32
    for entries in (64, 12):  # by vectors, and one by one
        assert not nearest_entries(linear, codebook[:1].repeat(entries, 1), norms[:1].repeat(entries)).any()


@pytest.mark.parametrize(("entries", "runs"), [(256, 8), (64, 1), (16, 16), (4, 2)])
def test_every_run_gives_its_nearest_entry(entries: int, runs: int) -> None:
    linear, codebook, norms = _problem(entries, 3, 777)
    found, scores = best_of_runs(linear, codebook, norms, runs)
    for run in range(runs):
        part = slice(run * entries // runs, (run + 1) * entries // runs)
        expected = nearest_entries_reference(linear, codebook[part], norms[part]) + part.start
        assert torch.equal(found[run], expected)
    torch.testing.assert_close(scores, (norms[:, None] - 2 * codebook @ linear).gather(0, found))
