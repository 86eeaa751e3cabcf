"""Lattice codes: the search against exhaustive ones, the passes against theory."""

import pytest
import torch
from torch import Tensor

from casp_pl.kernels import lattice_nearest
from casp_pl.kernels.lattice import LATTICE_STAGES, QUARTER, e8p_points
from casp_pl.quantizers.lattice_codes import LatticeMoment, LatticeSearch, choose_step, encode_rows, prepare_moment
from casp_pl.quantizers.lattice_search import nearest_lattice_codes, squared_lengths, stage_values
from casp_pl.quantizers.quip import GAUSSIAN_STEPS


def _gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _metric(seed: int = 1) -> Tensor:
    root = _gaussian(8, 16, seed=seed)
    return root @ root.T / 16


def _moment(width: int, strength: float) -> LatticeMoment:
    """A second moment with `strength` of correlation between all columns."""
    x = _gaussian(4 * width, width) + strength * _gaussian(4 * width, width // 8, seed=1).repeat_interleave(8, dim=1)
    mix = torch.linalg.qr(_gaussian(width, width, seed=2))[0]
    return prepare_moment((mix.T @ (x.T @ x / len(x)) @ mix).double(), 1e-2)


def _loss(error: Tensor, moment: Tensor) -> float:
    return float(((moment @ error) * error).sum())


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.0912), (3, 0.0284), (4, 0.0077)])
def test_the_chosen_scales_are_the_best_for_a_gaussian(bits: int, expected: float) -> None:
    x = torch.randn(8, 4000, generator=torch.Generator().manual_seed(0))

    def error(step: float, residual: float = 1.0) -> float:
        first, *others = LATTICE_STAGES[bits]
        stages = (first, *(stage._replace(scale=residual * stage.scale) for stage in others))
        _, rest = nearest_lattice_codes(step * x, torch.eye(8), stages, runs=4, beam=4)
        return float(rest.square().mean()) / step**2

    step = GAUSSIAN_STEPS[bits]
    assert error(step) == pytest.approx(expected, rel=0.015)
    assert error(step) < min(error(0.93 * step), error(1.07 * step))
    if bits > 2:
        assert error(step) < min(error(step, 0.9), error(step, 1.1))


def test_a_beam_as_wide_as_all_candidates_chooses_the_best_pair() -> None:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(8, 16, generator=generator)
    metric, target = root @ root.T / 16, torch.randn(8, 50, generator=generator)
    stages = LATTICE_STAGES[3]
    codes, rest = nearest_lattice_codes(target, metric, stages, runs=2, beam=4)
    value = sum(stage_values(own, stage) for own, stage in zip(codes, stages, strict=True))
    torch.testing.assert_close(target - value, rest)
    second = stage_values(torch.arange(256), stages[1])  # for its first code the second is the best of all 256
    others = squared_lengths((target - stage_values(codes[0], stages[0]))[:, :, None] - second[:, None], metric)
    torch.testing.assert_close(squared_lengths(rest, metric), others.amin(dim=1))


@pytest.mark.parametrize("runs", [1, 4, 32])
@pytest.mark.parametrize("way", ["compiled", "torch"])
def test_the_metric_chooses_among_the_candidates(way: str, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "torch":
        monkeypatch.setattr(lattice_nearest, "lattice_loops", lambda _: None)
    generator = torch.Generator().manual_seed(runs)
    x, root = torch.randn(8, 131, generator=generator), torch.randn(8, 8, generator=generator)
    metric = root @ root.T + torch.eye(8)
    codes, rest = nearest_lattice_codes(x, metric, LATTICE_STAGES[2], runs=runs, beam=1)
    table = e8p_points(torch.device("cpu")).float() * QUARTER
    assert torch.equal(rest, x - table[codes[0]].T)
    left = x.T.double() - table[lattice_nearest.e8p_candidates(x, runs)].double()  # (K, N, 8)
    costs = torch.einsum("kni,ij,knj->kn", left, metric.double(), left)
    own = torch.einsum("in,ij,jn->n", rest.double(), metric.double(), rest.double())
    torch.testing.assert_close(own, costs.min(dim=0).values)


def test_candidates_in_a_metric_come_close_to_the_best_of_all_points() -> None:
    metric, target = _metric(), _gaussian(8, 60)
    errors = target.T[:, None] - e8p_points(torch.device("cpu")) * QUARTER
    best = torch.einsum("npi,ij,npj->np", errors, metric, errors).amin(dim=1).mean()
    costs = []
    for runs in (1, 4, 16):
        _, rest = nearest_lattice_codes(target, metric, LATTICE_STAGES[2], runs=runs, beam=1)
        costs.append(squared_lengths(rest, metric).mean() / best)
    assert costs[0] > costs[1] > costs[2] >= 1
    assert costs[2] < 1.2


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_error_feedback_costs_what_theory_says(strength: float) -> None:
    """The loss of LDLQ is the codebook's error times tr(D) / tr(H) (QuIP, arXiv 2307.13304, theorem 1)."""
    moment, weight, step = _moment(128, strength), _gaussian(256, 128), GAUSSIAN_STEPS[2]
    _, error = encode_rows(step * weight, moment, LatticeSearch(LATTICE_STAGES[2], sweeps=0, runs=1, beam=1))
    loss = _loss(error, moment.moment) / step**2 / _loss(weight.T, moment.moment)
    share = moment.feedback.diagonal(dim1=1, dim2=2).sum() / moment.moment.diagonal().sum()
    assert loss == pytest.approx(float(0.0912 * share), rel=0.08)
    if strength:
        assert share < 0.8


@pytest.mark.parametrize("bits", [2, 3])
def test_sweeps_keep_their_books_and_never_raise_the_loss(bits: int) -> None:
    moment, weight, stages = _moment(96, 1.0), _gaussian(20, 96), LATTICE_STAGES[bits]
    losses = []
    for sweeps in range(4):
        codes, error = encode_rows(weight, moment, LatticeSearch(stages, sweeps=sweeps, runs=4, beam=4))
        values = sum(stage_values(own.flatten(), stage) for own, stage in zip(codes, stages, strict=True))
        decoded = values.view(8, 12, 20).transpose(0, 1).flatten(0, 1)  # (8, G, O) -> (P, O)
        torch.testing.assert_close(weight.T - decoded, error, rtol=1e-4, atol=1e-4)
        losses.append(_loss(error, moment.moment))
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.98 * losses[0]


def test_the_scale_stays_for_a_gaussian_and_leaves_room_for_long_tails() -> None:
    moment, start = _moment(64, 1.0), GAUSSIAN_STEPS[2]
    search = LatticeSearch(LATTICE_STAGES[2], sweeps=2, runs=4, beam=1)
    assert choose_step(_gaussian(128, 64), moment, search, start) == start
    tailed = _gaussian(128, 1) * _gaussian(1, 64, seed=1)
    step = choose_step(tailed, moment, search, start)
    assert step < 0.9 * start
    losses = [_loss(encode_rows(tailed * size, moment, search)[1], moment.moment) / size**2 for size in (step, start)]
    assert losses[0] < 0.9 * losses[1]
