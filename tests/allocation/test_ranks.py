import itertools

import pytest
import torch

from casp_pl.allocation import explicit_ranks, spectral_ranks, uniform_rank
from casp_pl.errors import ConfigError, NumericsError


@pytest.mark.parametrize(
    ("shape", "keep_ratio", "grain", "expected"),
    [
        ((4096, 4096), 0.25, 8, 512),
        ((1024, 4096), 0.25, 8, 200),  # GQA: 204.8
        ((576, 576), 0.25, 8, 72),
        ((192, 576), 0.5, 1, 72),
        ((48, 48), 1.0, 1, 24),
        ((13, 7), 0.9, 1, 4),
    ],
)
def test_uniform_rank_keeps_at_most_the_ratio(shape, keep_ratio, grain, expected):
    rank = uniform_rank(shape, keep_ratio, grain)
    assert rank == expected
    assert rank * sum(shape) <= keep_ratio * shape[0] * shape[1]
    assert (rank + grain) * sum(shape) > keep_ratio * shape[0] * shape[1]


@pytest.mark.parametrize("keep_ratio", [0.0, -0.1, 1.01, float("nan")])
def test_keep_ratio_outside_its_range_is_refused(keep_ratio):
    with pytest.raises(ConfigError, match="keep_ratio"):
        uniform_rank((64, 64), keep_ratio)


def test_rank_zero_says_which_ratio_would_do():
    with pytest.raises(ConfigError, match="rank 0") as caught:
        uniform_rank((16, 48), 0.25, grain=8)
    needed = float(str(caught.value).rsplit("at least ", 1)[1].rstrip("."))
    assert uniform_rank((16, 48), needed, grain=8) == 8
    with pytest.raises(ConfigError, match="leave it dense"):
        uniform_rank((4, 4), 1.0, grain=8)


def spectra_of(shapes, decay):
    return [
        torch.exp(-rate * torch.arange(min(shape), dtype=torch.float32))
        for shape, rate in zip(shapes, decay, strict=True)
    ]


def tail(spectrum, rank):
    energy = spectrum.double() ** 2
    return 0.0 if rank is None else float(energy[rank:].sum() / energy.sum())


def parameters(shape, rank):
    return shape[0] * shape[1] if rank is None else rank * sum(shape)


def test_spectral_ranks_equal_exhaustive_search():
    shapes = [(12, 12), (6, 12), (9, 12)]
    spectra = spectra_of(shapes, [0.02, 0.3, 0.9])
    budget = sum(uniform_rank(shape, 0.5) * sum(shape) for shape in shapes)
    every = itertools.product(*([None, *range(1, min(shape) + 1)] for shape in shapes))
    best = min(
        sum(tail(spectrum, rank) for spectrum, rank in zip(spectra, ranks, strict=True))
        for ranks in every
        if sum(parameters(shape, rank) for shape, rank in zip(shapes, ranks, strict=True)) <= budget
    )
    ranks = spectral_ranks(spectra, shapes, 0.5)
    assert sum(parameters(shape, rank) for shape, rank in zip(shapes, ranks, strict=True)) <= budget
    assert sum(tail(spectrum, rank) for spectrum, rank in zip(spectra, ranks, strict=True)) == pytest.approx(best)


@pytest.mark.parametrize(("true_rank", "noise", "keep_ratio"), [(48, 0, 1.0), (9, 0, 0.9), (9, 1e-6, 0.75)])
def test_spectral_ranks_of_exactly_low_rank_weights_lose_nothing(true_rank, noise, keep_ratio):
    generator = torch.Generator().manual_seed(0)
    shapes = [(48, 48)] * 12
    spectra = [
        torch.linalg.svdvals(
            torch.randn(48, true_rank, generator=generator) @ torch.randn(true_rank, 48, generator=generator)
            + noise * torch.randn(48, 48, generator=generator)
        )
        for _ in shapes
    ]
    ranks = spectral_ranks(spectra, shapes, keep_ratio, grain=8)
    assert sum(parameters(shape, rank) for shape, rank in zip(shapes, ranks, strict=True)) <= keep_ratio * 48 * 48 * 12
    if true_rank == 9:
        assert sum(tail(spectrum, rank) for spectrum, rank in zip(spectra, ranks, strict=True)) < 1e-10


def test_spectral_ranks_of_equal_spectra_are_nearly_uniform():
    shapes = [(64, 64)] * 6
    ranks = spectral_ranks(spectra_of(shapes, [0.05] * 6), shapes, 0.25, grain=4)
    assert ranks == [uniform_rank((64, 64), 0.25, 4)] * 6


def test_spectral_ranks_give_a_flat_weight_what_a_steep_one_does_not_need():
    shapes = [(64, 64)] * 4
    ranks = spectral_ranks(spectra_of(shapes, [0.0, 0.5, 0.5, 0.5]), shapes, 0.5, grain=4)
    assert ranks[0] is None
    assert all(rank is not None and 4 <= rank <= 16 for rank in ranks[1:])


def test_relative_tails_do_not_care_for_loudness():
    shapes = [(32, 32)] * 2
    quiet, loud = spectra_of(shapes, [0.1, 0.1])
    assert spectral_ranks([quiet, 100 * loud], shapes, 0.5) == spectral_ranks([quiet, loud], shapes, 0.5)
    absolute = spectral_ranks([quiet, 100 * loud], shapes, 0.5, relative=False)
    assert absolute[1] is None or absolute[1] > absolute[0]


def test_a_broken_spectrum_is_a_numerics_error():
    with pytest.raises(NumericsError):
        spectral_ranks([torch.tensor([1.0, float("nan")])], [(2, 2)], 1.0)


def test_explicit_ranks_are_rounded_and_checked():
    shapes = {"a.q_proj": (64, 64), "a.k_proj": (16, 64)}
    assert explicit_ranks({"a.q_proj": 21}, shapes, grain=8) == {"a.q_proj": 16, "a.k_proj": None}
    with pytest.raises(ConfigError, match="no module is called 'b'"):
        explicit_ranks({"b": 8}, shapes)
    with pytest.raises(ConfigError, match="exceeds"):
        explicit_ranks({"a.k_proj": 17}, shapes)
    with pytest.raises(ConfigError, match="grain"):
        explicit_ranks({"a.k_proj": 0}, shapes, grain=8)
