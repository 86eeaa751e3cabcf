"""The chunked divergence against the formula on whole logits, value and gradient, at odd sizes."""

import pytest
import torch

from casp_pl.kernels.divergence import head_divergence, head_divergence_reference


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 256), (7, 3), (13, 13), (20, 7)])
def test_value_and_gradient(tokens: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    student = torch.randn(tokens, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(tokens, 11, generator=generator, dtype=torch.float64)
    head = torch.randn(37, 11, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad(3 * head_divergence_reference(student, teacher, head), student)
    value = head_divergence(student, teacher, head, chunk=chunk)
    (actual,) = torch.autograd.grad(3 * value, student)
    reference = head_divergence_reference(student, teacher, head).detach().float()
    torch.testing.assert_close(value.detach(), reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)  # the softmax is taken in float32


def test_equal_states_have_no_divergence() -> None:
    states = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    head = torch.randn(19, 8, generator=torch.Generator().manual_seed(1))
    assert abs(float(head_divergence(states, states.clone(), head))) < 1e-6


def test_no_gradient_wanted_none_made() -> None:
    states = torch.randn(5, 8)
    assert not head_divergence(states, states + 1, torch.randn(19, 8)).requires_grad
