"""Memory between the stages."""

import gc
import platform
import weakref
from contextlib import nullcontext
from types import MethodType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import torch

from casp_pl.memory import modules_kept_apart, release_memory
from casp_pl.pipeline import run


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to give memory back")
def test_freed_memory_between_kept_tensors_goes_back_to_the_system() -> None:
    tensors = [torch.ones(6000) for _ in range(20_000)]  # 480 MB, each too small to have pages of its own mapping
    kept = tensors[::50]
    del tensors
    before = psutil.Process().memory_info().rss
    release_memory()
    assert before - psutil.Process().memory_info().rss > 200e6
    assert all(bool((tensor == 1).all()) for tensor in kept)


def test_garbage_of_a_command_is_found_though_modules_are_not_searched() -> None:
    with modules_kept_apart():
        assert gc.get_freeze_count() > 100_000
        cycle = torch.nn.Module()
        cycle.__dict__["itself"], found = cycle, weakref.ref(cycle)
        del cycle
        release_memory()
        assert found() is None
    assert gc.get_freeze_count() == 0


def test_the_end_to_end_stage_is_gone_when_it_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the best state and Lightning's callbacks: half of what the evaluation had on top."""
    stages: list[Any] = []

    class Stage:
        steps = 1
        checkpoint = SimpleNamespace(step=0)

        def __init__(self, *_: Any) -> None:
            stages.append(weakref.ref(self))

        def fit(self, *_: Any) -> None:
            """Leaves nothing."""

    monkeypatch.setattr(run, "EndToEndStage", Stage)
    monkeypatch.setattr(run, "finished_blocks", lambda *_: None)
    left: list[Any] = []

    def measure(*_: Any) -> None:
        gc.collect()
        left.extend(stage() for stage in stages)

    names = ("adapter", "settings", "trainers", "progress", "broken", "keep")
    fake: Any = SimpleNamespace(**dict.fromkeys(names), run=Mock(), work=Mock(), _measure=measure)
    fake._working = lambda *_, **__: nullcontext()
    fake._train_end_to_end = MethodType(run.CompressionRun._train_end_to_end, fake)
    run.CompressionRun._end_to_end(fake, [], [])  # type: ignore[arg-type]
    assert left == [None]
