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


def test_autocast_takes_the_products_in_bfloat16_and_the_rest_in_float32() -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(9, 16, generator=generator, requires_grad=True) for _ in range(2))
    head = torch.randn(41, 16, generator=generator)
    rounded = head.bfloat16().float()
    reference = head_divergence_reference(student.bfloat16().float(), teacher.bfloat16().float(), rounded)
    (expected,) = torch.autograd.grad(reference, student)
    with torch.autocast("cpu", torch.bfloat16):
        value = head_divergence(student, teacher, head, chunk=4)
        (actual,) = torch.autograd.grad(value, student)
    assert value.dtype == actual.dtype == torch.float32
    torch.testing.assert_close(value.detach(), reference.detach(), rtol=2e-2, atol=1e-3)
    assert (actual - expected).norm() < 2e-2 * expected.norm()


def test_small_divergences_under_autocast_are_summed_in_full() -> None:
    """These decide which state of a training is the best."""
    generator = torch.Generator().manual_seed(3)
    student, head = torch.randn(9, 16, generator=generator), torch.randn(41, 16, generator=generator)
    teacher = student + 0.02 * torch.randn(9, 16, generator=generator)
    halves = ((states.bfloat16() @ head.bfloat16().T).double().log_softmax(-1) for states in (teacher, student))
    target, output = halves
    with torch.autocast("cpu", torch.bfloat16):
        value = head_divergence(student, teacher, head, chunk=4)
    expected = (target.exp() * (target - output)).sum(-1).mean()
    assert float(value) == pytest.approx(float(expected), rel=2e-4)
