"""A run that is stopped in every stage of work and resumed: its bar ends at 100 %, and no work is forgotten."""

import json
import os
import re
import signal
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from casp_pl.cli import main
from casp_pl.console import RunProgress
from casp_pl.modules import EndToEndModule
from casp_pl.pipeline import blocks, commands
from casp_pl.pipeline.block_files import LinearFiles
from casp_pl.quantizers import GPTQQuantizer

SLOW = 0.1  # seconds that a linear takes at least
ROWS = {"quantized": "quantize", "block_tuned": "block tuning", "end_to_end": "end to end"}


class Watched(RunProgress):
    """Tells everything, remembers itself, and what time was left before anything was earned."""

    made: list["Watched"] = []

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        super().__init__(*positional, **(keywords | {"verbose": True}))
        self.earned = False
        self.told_before: list[float | None] = []
        self.made.append(self)

    def advance(self, *positional: Any, **keywords: Any) -> None:
        self.earned = True
        super().advance(*positional, **keywords)

    def _show(self, **keywords: Any) -> None:
        if not self.earned:
            self.told_before.append(self.seconds_left)
        super()._show(**keywords)


def stop_at(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """SIGTERM to this process behind the call with this number."""
    work, calls = getattr(owner, name), count(1)

    def signalled(*positional: Any, **keywords: Any) -> Any:
        result = work(*positional, **keywords)
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    patch.setattr(owner, name, signalled)


def told(run: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    return report


def kept_seconds(run: Path) -> dict[str, float]:
    """Of finished work, as a process that was stopped left them."""
    (file,) = (run / "stages/work_seconds").iterdir()
    seconds: dict[str, float] = json.loads(file.read_text())["seconds"]
    return seconds


def check_end(output: str) -> None:
    progress = Watched.made[-1]
    assert (progress.share, progress.seconds_left) == (1.0, 0.0)
    unknown_or_over = {None, 0.0}
    assert set(progress.told_before) <= unknown_or_over, "nothing that is there already says how fast this run is"
    lines = [line for line in output.splitlines() if re.match(r" *\d+% ", line)]
    assert re.fullmatch(r"100% save 1/1, 0:00:00 left", lines[-1])


@pytest.mark.slow
def test_a_run_stopped_in_every_stage(
    recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, quantize = tmp_path / "run", GPTQQuantizer.quantize

    def slow(*positional: Any, **keywords: Any) -> Any:
        time.sleep(SLOW)
        return quantize(*positional, **keywords)

    monkeypatch.setattr(GPTQQuantizer, "quantize", slow)
    monkeypatch.setattr(commands, "RunProgress", Watched)
    command = ["fit", *(word.replace("llava_aqlm", "llava_gptq") for word in recipe), "--run_dir", str(run)]
    command += ["--evaluation.questions", "4", "--evaluation.text_tokens", "64"]
    # in block 1, in the second of two windows, in the third of four steps
    places: list[tuple[Any, str, int]] = [
        (LinearFiles, "add", 10),
        (blocks, "_tune_window", 2),
        (EndToEndModule, "training_step", 2),
    ]
    kept: dict[str, float] = {}
    for owner, name, call in places:
        with monkeypatch.context() as patch:
            stop_at(patch, owner, name, call)
            assert main(command) == 143
        kept |= kept_seconds(run)
    assert (run / "end_to_end/steps/000002").exists()
    capsys.readouterr()
    assert main(command) == 0
    check_end(capsys.readouterr().out)
    report = told(run)
    work, seconds = report["work_seconds"], {row["name"]: row["seconds"] for row in report["stages"]}
    assert kept.keys() == work.keys()
    assert kept["calibration"] == work["calibration"]
    assert all(work[stage] >= kept[stage] > 0 for stage in kept)
    assert work["end to end"] > kept["end to end"]
    assert work["quantize"] >= sum(module["seconds"] for module in report["modules"]) >= 14 * SLOW
    assert all(seconds[row] >= work[stage] for row, stage in ROWS.items())
    assert report["wall_seconds"] >= sum(seconds.values()) + work["calibration"]

    assert main(command) == 0
    check_end(capsys.readouterr().out)
    again = told(run)
    assert again["work_seconds"] == work
    assert again["stages"] == report["stages"]
    assert again["modules"] == report["modules"]


@pytest.mark.slow
def test_a_run_without_propagation_goes_on_inside_a_block(
    recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["fit", *(word.replace("llava_aqlm", "llava_gptq") for word in recipe), "--quantization.propagation", "0"]
    command += ["--block_tuning.epochs", "0", "--end_to_end.steps", "0", "--evaluation.questions", "4"]
    command += ["--evaluation.text_tokens", "64"]
    with monkeypatch.context() as patch:
        stop_at(patch, LinearFiles, "add", 10)
        assert main([*command, "--run_dir", str(tmp_path / "stopped")]) == 143
    models = []
    for name in ("stopped", "whole"):
        assert main([*command, "--run_dir", str(tmp_path / name)]) == 0
        models.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
    assert models[0] == models[1]
