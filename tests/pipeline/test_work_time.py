"""The time that stages worked: kept piece by piece, added up over processes, forgotten by none."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from casp_pl.checkpoint import RunDirectory
from casp_pl.pipeline.work_time import WorkTime


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_pieces_of_several_processes_add_up_and_what_was_there_counts_for_nothing(tmp_path: Path) -> None:
    clock = Clock()
    with RunDirectory.open(tmp_path, {}) as run:
        work = WorkTime(run, clock)
        with suppress(KeyboardInterrupt), work.stage("quantize"):
            for end in (10.0, 30.0):
                clock.now = end
                work.done()
            clock.now = 35.0  # of a piece that is not finished
            raise KeyboardInterrupt
    assert work.seconds == {"quantize": 30.0}
    with RunDirectory.open(tmp_path, {}) as run:
        work = WorkTime(run, clock)
        with work.stage("quantize"):
            for end in (36.0, 37.0):
                clock.now = end
                work.recall()
            clock.now = 57.0
            work.done()
            clock.now = 58.0
        assert WorkTime(run, clock).seconds == {"quantize": 30.0 + 20.0 + 1.0}
        with work.stage("quantize"):
            clock.now = 60.0
            work.recall()
            clock.now = 61.0
        with work.stage("block tuning"):
            clock.now = 64.0
    with RunDirectory.open(tmp_path, {}) as run:
        assert WorkTime(run, clock).seconds == {"quantize": 51.0, "block tuning": 3.0}


def test_a_stage_that_begins_afresh_forgets_what_was_in_vain(tmp_path: Path) -> None:
    clock = Clock()
    with RunDirectory.open(tmp_path, {}) as run:
        for end in (10.0, 25.0):
            with WorkTime(run, clock).stage("calibration", afresh=True):
                clock.now = end
        assert WorkTime(run, clock).seconds == {"calibration": 15.0}


@pytest.mark.parametrize("name", ["_record", "_forget"])
def test_a_kill_between_two_states_leaves_one(
    name: str, killed_in: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the new file is entered, and before the older one is taken out."""
    clock = Clock()

    def work(*ends: float) -> None:
        with RunDirectory.open(tmp_path, {}) as run:
            kept = WorkTime(run, clock)
            with kept.stage("quantize"):
                for end in ends:
                    clock.now = end
                    kept.done()

    work(10.0)
    killed_in(RunDirectory, name, work, 30.0)
    with RunDirectory.open(tmp_path, {}) as run:
        assert WorkTime(run, clock).seconds == {"quantize": {"_record": 10.0, "_forget": 30.0}[name]}
    assert not caplog.messages
    assert len(list((tmp_path / "stages/work_seconds").iterdir())) == 1
