"""What the benchmark of kills does with a run that hangs, and which stage it tells."""

import json
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


def test_the_stage_is_that_which_a_run_would_go_on_with(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((finished_run / "manifest.json").read_text())
    monkeypatch.setattr(kills, "BLOCKS", sum(name.startswith("blocks/") for name in manifest["artifacts"]))

    def without(*gone: str) -> str:
        names = {name: entry for name, entry in manifest["artifacts"].items() if name not in gone}
        (tmp_path / "manifest.json").write_text(json.dumps({"artifacts": names}))
        return kills.stage_of(tmp_path)

    assert without() == "finished"
    assert without("examples.png") == "report"
    assert without("examples.png", "model/manifest.json") == "save"
    assert without("end_to_end/000.safetensors", "examples.png", "model/manifest.json") == "end to end"
    assert without(*manifest["artifacts"]) == "original"
