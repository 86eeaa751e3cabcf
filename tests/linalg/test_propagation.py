"""The target behind a compressed prefix against a general least squares solver."""

import pytest
import torch
from torch import Tensor

from casp_pl.errors import NumericsError
from casp_pl.linalg.propagation import PropagationTarget


def _problem() -> tuple[Tensor, Tensor, Tensor]:
    """Weight (O, I), original inputs (N, I), inputs here (N, I)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    original = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    drift = torch.eye(8, dtype=torch.float64) + 0.2 * torch.randn(8, 8, generator=generator, dtype=torch.float64)
    here = original @ drift + 0.1 * torch.randn(60, 8, generator=generator, dtype=torch.float64)
    return weight, original, here


def test_full_correction_is_damped_least_squares() -> None:
    weight, original, here = _problem()
    moment = here.T @ here
    root = (0.05 * moment.diagonal().mean()).sqrt() * torch.eye(8, dtype=torch.float64)
    inputs, outputs = torch.cat([here, root]), torch.cat([original, root]) @ weight.T
    expected = torch.linalg.lstsq(inputs, outputs).solution.T
    target = PropagationTarget(original.T @ here, moment, 1.0, damping=0.05).of(weight)
    torch.testing.assert_close(target, expected)


def test_alpha_goes_from_the_weight_to_the_full_correction() -> None:
    weight, original, here = _problem()
    moments = original.T @ here, here.T @ here
    full = PropagationTarget(*moments, 1.0).of(weight)
    assert torch.equal(PropagationTarget(*moments, 0.0).of(weight), weight)
    torch.testing.assert_close(PropagationTarget(*moments, 0.25).of(weight), weight + 0.25 * (full - weight))


def test_it_brings_the_outputs_closer_to_the_original() -> None:
    weight, original, here = _problem()
    target = PropagationTarget(original.T @ here, here.T @ here, 1.0).of(weight)
    error, before = ((here @ w.T - original @ weight.T).square().sum() for w in (target, weight))
    assert error < 0.2 * before


def test_broken_moments_are_an_error() -> None:
    weight, original, here = _problem()
    original[3, 2] = float("nan")
    with pytest.raises(NumericsError, match="cross moment"):
        PropagationTarget(original.T @ here, here.T @ here, 1.0).of(weight)


@pytest.mark.parametrize("tokens", [60, 3])
def test_equal_inputs_change_nothing(tokens: int) -> None:
    weight, original, _ = _problem()
    moment = original[:tokens].T @ original[:tokens]
    target = PropagationTarget(moment, moment, 1.0).of(weight.float())
    assert target.dtype == torch.float32
    torch.testing.assert_close(target, weight.float())


def test_strips_of_a_wide_weight_are_the_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    here, drift = (torch.randn(900, 700, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(530, 700, generator=generator, dtype=torch.float64)
    moment, cross = here.T @ here, (here + 0.1 * drift).T @ here
    jitter = 0.01 * moment.diagonal().mean() * torch.eye(700, dtype=torch.float64)
    expected = weight @ (cross + jitter) @ torch.linalg.inv(moment + jitter)
    actual = PropagationTarget(cross, moment, 1.0, damping=0.01).of(weight)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
