"""A signal in end-to-end training costs no step: the one under way is finished and saved, the same command goes on."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from casp_pl.checkpoint import RunDirectory
from casp_pl.cli import main
from casp_pl.modules import EndToEndModule
from casp_pl.stopping import LateStop, at_once

STEPS = 4  # of the tiny recipe
NOTICE = "a second signal stops at once"
GOES_ON = "the same command goes on from here"

SIGNALLED = """
import os, signal, sys
from casp_pl.cli import main
from casp_pl.modules import EndToEndModule

step = EndToEndModule.training_step

def signalled(self, batch, batch_idx):
    if self.global_step == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, batch, batch_idx)

EndToEndModule.training_step = signalled
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A run that its end-to-end stage is still to come of."""
    folder = Path(shutil.copytree(finished_run, tmp_path / "run"))
    for made in ("end_to_end", "model"):
        shutil.rmtree(folder / made)
    (folder / "stages/end_to_end.json").unlink()
    return folder


def command(recipe: list[str], run: Path) -> list[str]:
    return ["fit", *recipe, "--run_dir", str(run), "--end_to_end.checkpoint_every", "0"]


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "end_to_end/steps").glob("*"))


def send_in_step(monkeypatch: pytest.MonkeyPatch, number: int, wanted: int, times: int = 1) -> None:
    step: Any = EndToEndModule.training_step

    def signalled(self: EndToEndModule, batch: Any, batch_idx: int) -> Any:
        if self.global_step == wanted:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(EndToEndModule, "training_step", signalled)


@pytest.mark.slow
def test_sigterm_in_a_step_is_obeyed_after_it(
    recipe: list[str], run: Path, finished_run: Path, tensor_digests: Callable[[Path], dict[str, str]]
) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    script = [sys.executable, "-c", SIGNALLED, *command(recipe, run)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 143, done.stderr
    assert done.stderr.count(NOTICE) == 1
    assert GOES_ON in done.stderr.splitlines()[-1]
    assert saved(run) == ["000002"], "the step under way counts, and there are no other checkpoints"
    assert main(command(recipe, run)) == 0
    assert tensor_digests(run) == tensor_digests(finished_run)


@pytest.mark.slow
def test_sigint_in_the_last_step_leaves_nothing_to_train(
    recipe: list[str],
    run: Path,
    finished_run: Path,
    tensor_digests: Callable[[Path], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with monkeypatch.context() as patch:
        send_in_step(patch, signal.SIGINT, STEPS - 1)
        assert main(command(recipe, run)) == 130
    assert saved(run) == [f"{STEPS:06d}"]
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert main(command(recipe, run)) == 0
    assert tensor_digests(run) == tensor_digests(finished_run)


@pytest.mark.slow
def test_a_second_signal_stops_at_once(
    recipe: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    send_in_step(monkeypatch, signal.SIGTERM, 1, times=2)
    assert main(command(recipe, run)) == 143
    assert saved(run) == []
    assert NOTICE in capfd.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_of_another_layout_gives_way_to_one_of_the_same_step(
    recipe: list[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "end_to_end/steps/000002"
    with RunDirectory.open(run, RunDirectory.read_only(run).fingerprint) as own:
        for rank in range(2):
            own.write_tensors(f"{name}/{rank:03d}.safetensors", {"x": torch.zeros(1)}, {"layout": "fsdp2 2"})
    send_in_step(monkeypatch, signal.SIGTERM, 1)
    assert main(command(recipe, run)) == 143
    files = RunDirectory.read_only(run)
    assert files.names(name) == [f"{name}/000.safetensors"]
    assert files.read_tensors(f"{name}/000.safetensors")[1]["layout"] == "whole"
    assert sorted(path.name for path in (run / name).iterdir()) == ["000.safetensors"]


class _Reached(Exception):
    """What the handler from before raises."""


def _raise(*_: object) -> None:
    raise _Reached


@pytest.fixture
def stop() -> Any:
    """A `LateStop` under way, over a handler of SIGTERM that raises."""
    before = signal.signal(signal.SIGTERM, _raise)
    late = LateStop()
    late.begin()
    yield late
    late.end()
    signal.signal(signal.SIGTERM, before)


def test_the_first_is_noted_the_second_is_not_put_off(stop: LateStop) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.number == signal.SIGTERM
    with pytest.raises(_Reached):
        os.kill(os.getpid(), signal.SIGTERM)


def test_nothing_is_put_off_where_another_process_has_failed(stop: LateStop) -> None:
    with at_once(), pytest.raises(_Reached):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.number == 0


def test_outside_the_main_thread_signals_do_what_they_did() -> None:
    late = LateStop()
    before = signal.getsignal(signal.SIGTERM)

    thread = threading.Thread(target=late.begin)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    late.end()
