"""What is made of a second moment, in float64 copies of it: at 7B shape each is a gigabyte."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import profile

from casp_pl.linalg import PropagationTarget
from casp_pl.quantizers import AQLMQuantizer, GPTQQuantizer, QuIPSharpQuantizer, aqlm

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
        (AQLMQuantizer(formats={2: [[1, 256, 4]]}, max_rounds=1), 1.7),
        (QuIPSharpQuantizer(sweeps=0), 2.7),
    ],
    ids=["gptq", "aqlm", "quip"],
)
def test_a_quantizer_makes_few_copies_of_a_moment(quantizer: Any, most: float, weight: Tensor, moment: Tensor) -> None:
    assert 1 < _copies(lambda: quantizer.quantize(weight, moment, bits=2)) < most


def test_what_aqlm_keeps_for_other_linears_is_gone_where_there_are_none(
    moment: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = torch.randn(3 * WIDTH // 8, WIDTH, generator=torch.Generator().manual_seed(2))  # as the last of a block is
    given = {"formats": {2: [[2, 256, 8]]}, "max_rounds": 1}
    kept = _copies(lambda: AQLMQuantizer(**given).quantize(wide, moment, bits=2))
    monkeypatch.setattr(aqlm, "_SHARED_WIDTH", WIDTH - 1)
    assert 1 < _copies(lambda: AQLMQuantizer(**given).quantize(wide, moment, bits=2)) < min(1.7, kept - 0.3)


def test_a_target_makes_one_copy_of_a_moment(weight: Tensor, moment: Tensor) -> None:
    assert 1 < _copies(lambda: PropagationTarget(moment, moment, 0.5).of(weight)) < 1.4
