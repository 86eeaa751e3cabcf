"""Proxy losses against the errors of outputs."""

import math

import pytest
import torch

from casp_pl.linalg.losses import proxy_loss, relative_proxy_loss


@pytest.mark.parametrize("width", [1, 7, 512, 513, 1100])
def test_losses_are_squared_errors_of_the_outputs(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, approx = (torch.randn(5, width, generator=generator) for _ in "wq")
    inputs = torch.randn(40, width, generator=generator)
    moment = inputs.T @ inputs
    expected = (inputs @ (weight - approx).T).double().square().sum().item()
    assert proxy_loss(weight, approx, moment) == pytest.approx(expected, rel=1e-5)
    energy = (inputs @ weight.T).double().square().sum().item()
    assert relative_proxy_loss(weight, approx, 3.0 * moment) == pytest.approx(expected / energy, rel=1e-5)


def test_no_layer_at_all_has_loss_one_and_zero_weights_are_defined() -> None:
    weight, zero = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.zeros(5, 7)
    assert relative_proxy_loss(weight, zero, torch.eye(7)) == pytest.approx(1.0)
    assert relative_proxy_loss(zero, zero, torch.eye(7)) == 0.0
    assert math.isinf(relative_proxy_loss(zero, weight, torch.eye(7)))


def test_half_weights_and_parameters_are_taken() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    assert proxy_loss(weight, torch.zeros(2, 3), torch.eye(3)) == pytest.approx(6.0)
