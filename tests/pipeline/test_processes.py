"""Two real processes on the CPU: the same model as one makes, and no one left behind when one is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def command(recipe: list[str], folder: Path, processes: int) -> list[str]:
    # bfloat16 rounds each process's share of a gradient: then only most of what training does is the same
    settings = ["--trainer.precision", "32-true", "--codebook_update.every", "2", "--data.batch_size", "5"]
    settings += ["--trainer.devices", str(processes)]
    return [sys.executable, "-m", "casp_pl", "fit", *recipe, *settings, "--run_dir", str(folder)]


@pytest.fixture(scope="module")
def alone(recipe: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    finish(recipe, folder, 1)
    return folder


def finish(recipe: list[str], folder: Path, processes: int) -> str:
    done = subprocess.run(
        command(recipe, folder, processes), env=os.environ | SINGLE_THREAD, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_equal_runs(one: Path, other: Path) -> None:
    assert json.loads((one / "plan.json").read_text()) == json.loads((other / "plan.json").read_text())
    codes = same = 0
    for path in sorted(one.glob("*/[0-9]*.safetensors")):
        theirs = load_file(other / path.relative_to(one))
        for name, tensor in load_file(path).items():
            if name.endswith("codes"):
                codes, same = codes + tensor.numel(), same + int((tensor == theirs[name]).sum())
            else:
                torch.testing.assert_close(theirs[name].float(), tensor.float(), rtol=1e-4, atol=1e-6)
    assert same >= 0.999 * codes > 0
    stages = [json.loads((run / "report.json").read_text())["stages"] for run in (one, other)]
    for figure in ("bits_per_weight_total", "model_bytes", "vqa_accuracy", "perplexity", "questions", "text_tokens"):
        mine, theirs = ([stage[figure] for stage in run] for run in stages)
        assert theirs == pytest.approx(mine, rel=1e-4), figure


def assert_equal_losses(one: Path, other: Path) -> None:
    """Every training step and every validation, to 1e-5 of its loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = [EventAccumulator(str(run / "tensorboard")).Reload() for run in (one, other)]
    tags = [tag for tag in events[0].Tags()["scalars"] if tag.startswith(("block_tuning", "end_to_end"))]
    assert len(tags) == 7
    for tag in tags:
        mine, theirs = ([event.value for event in run.Scalars(tag)] for run in events)
        assert theirs == pytest.approx(mine, rel=1e-5), tag


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_make_what_one_makes(processes: int, recipe: list[str], alone: Path, tmp_path: Path) -> None:
    output = finish(recipe, tmp_path / "run", processes)
    assert_equal_runs(alone, tmp_path / "run")
    assert_equal_losses(alone, tmp_path / "run")
    assert output.count("calibration ") == 1, "the other processes are silent"


STREAMED = """
import os, sys
import psutil
from casp_pl.cli import main
from casp_pl.models import load
from casp_pl.models.streamed import load_streamed

free = (64 << 30, 400_000)[int(os.environ["RANK"])]  # the model has 250 kB: the second process alone would stream it
virtual_memory = psutil.virtual_memory
psutil.virtual_memory = lambda: virtual_memory()._replace(available=free)
opened = []
load.load_streamed = lambda *places, **how: opened.append(places) or load_streamed(*places, **how)
code = main(sys.argv[1:])
assert len(opened) == 1, "not streamed"
sys.exit(code)
"""


@pytest.mark.slow
def test_processes_agree_on_streaming_and_make_what_one_makes_in_memory(
    recipe: list[str],
    alone: Path,
    stored_tiny: Path,
    tmp_path: Path,
    start_together: Callable[..., list[subprocess.Popen[bytes]]],
    finish_together: Callable[..., None],
) -> None:
    arguments = [*command(recipe, tmp_path / "run", 2)[3:], "--model.source", str(stored_tiny), "--override_memory"]
    finish_together(start_together(["-c", STREAMED, *arguments]))
    assert_equal_runs(alone, tmp_path / "run")
    assert_equal_losses(alone, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_stops_the_other_and_the_run_goes_on_alone(
    victim: int, recipe: list[str], alone: Path, tmp_path: Path
) -> None:
    first = subprocess.Popen(
        command(recipe, tmp_path / "run", 2), env=os.environ | SINGLE_THREAD, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not (tmp_path / "run/blocks/000.safetensors").exists() and time.monotonic() < deadline:
        assert first.poll() is None
        time.sleep(0.005)
    family = psutil.Process(first.pid)
    (second,) = [child for child in family.children() if "casp_pl" in " ".join(child.cmdline())]
    (family, second)[victim].send_signal(signal.SIGKILL)
    assert first.wait(60) != 0
    second.wait(60)
    finish(recipe, tmp_path / "run", 1)
    assert_equal_runs(alone, tmp_path / "run")
