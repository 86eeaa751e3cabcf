"""What the benchmark of kills does with a run that hangs."""

import time
from pathlib import Path

import pytest

from benchmarks import kills


def test_a_run_that_never_locks_its_directory_ends_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kills, "_fit", lambda *_: time.sleep(60))
    monkeypatch.setattr(kills, "LOCKED", 0.2)
    run = kills.Run(tmp_path, "000", 2)
    with pytest.raises(SystemExit, match=r"000 was not locked within 0.2 s: ranks \[0, 1\] hung and were killed"):
        run.wait_for_lock()
    assert run.codes() == [-9, -9]
