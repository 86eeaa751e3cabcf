"""What is made of a second moment, in float64 copies of it: at 7B shape each is a gigabyte."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import profile

from casp_pl.linalg import PropagationTarget
from casp_pl.quantizers import AQLMQuantizer, GPTQQuantizer, QuIPSharpQuantizer

WIDTH, ROWS = 2048, 8


@pytest.fixture(scope="module")
def weight() -> Tensor:
    """W (O, I)."""
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def moment() -> Tensor:
    """H (I, I) in float32, of full rank."""
    inputs = torch.randn(WIDTH + 64, WIDTH, generator=torch.Generator().manual_seed(0))
    return inputs.T @ inputs / len(inputs)


def _copies(work: Callable[[], Any]) -> float:
    """The most that torch has allocated at once meanwhile, inside its operators too."""
    with profile(profile_memory=True) as record:
        work()
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / (8 * WIDTH**2)


@pytest.mark.parametrize(
    ("quantizer", "most"),
    [
        (GPTQQuantizer(), 2.3),
        (AQLMQuantizer(formats={2: [[1, 256, 4]]}, max_rounds=1), 2.0),
        (QuIPSharpQuantizer(sweeps=0), 2.7),
    ],
    ids=["gptq", "aqlm", "quip"],
)
def test_a_quantizer_makes_few_copies_of_a_moment(quantizer: Any, most: float, weight: Tensor, moment: Tensor) -> None:
    assert 1 < _copies(lambda: quantizer.quantize(weight, moment, bits=2)) < most


def test_a_target_makes_one_copy_of_a_moment(weight: Tensor, moment: Tensor) -> None:
    assert 1 < _copies(lambda: PropagationTarget(moment, moment, 0.5).of(weight)) < 1.4
