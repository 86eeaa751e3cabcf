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

ROOT = Path(__file__).parents[2]
RESOURCES = 5
SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


# each process but the first has nothing to calibrate, train, validate or evaluate on
FEW = ["--data.samples", "2", "--data.text_ratio", "0", "--data.holdout", "0.5", "--data.fine_tuning_samples", "null"]
FEW += ["--data.questions_per_image", "1", "--evaluation.questions", "1", "--evaluation.text_tokens", "64"]


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
    assert "warning" not in (done.stdout + done.stderr).lower()
    return done.stdout


def assert_equal_runs(one: Path, other: Path) -> None:
    assert json.loads((one / "plan.json").read_text()) == json.loads((other / "plan.json").read_text())
    codes = same = numbers = apart = 0
    for path in sorted(one.glob("*/[0-9]*.safetensors")):
        theirs = load_file(other / path.relative_to(one))
        for name, tensor in load_file(path).items():
            if name.endswith("codes"):
                codes, same = codes + tensor.numel(), same + int((tensor == theirs[name]).sum())
                continue
            # training, whose sums differ by 1e-6, ends with a rounding to float16: few numbers lie so near to the
            # middle of two of its own that they go to the other one
            step = 2**-10 if path.parent.name == "end_to_end" else 1e-4
            torch.testing.assert_close(theirs[name], tensor, rtol=step, atol=1e-6)
            close = torch.isclose(theirs[name], tensor, rtol=1e-4, atol=1e-6)
            numbers, apart = numbers + close.numel(), apart + int((~close).sum())
    assert same >= 0.999 * codes > 0
    assert apart <= 5e-3 * numbers
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


def wait_for_first_block(folder: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while not (folder / "blocks/000.safetensors").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)


@pytest.mark.slow
def test_fewer_samples_than_processes(recipe: list[str], tmp_path: Path) -> None:
    fast = [word.replace("llava_aqlm", "llava_gptq") for word in recipe]
    for processes in (1, 2):
        finish([*fast, *FEW], tmp_path / f"{processes}", processes)
    assert_equal_runs(tmp_path / "1", tmp_path / "2")
    assert_equal_losses(tmp_path / "1", tmp_path / "2")
    data = json.loads((tmp_path / "2" / "report.json").read_text())["data"]
    assert (data["calibration"]["samples"], data["calibration"]["held_back_samples"]) == (1, 1)
    assert (data["evaluation"]["questions"], data["evaluation"]["text_tokens"]) == (1, 64)


STREAMED = """
import os, sys
import psutil
from casp_pl.cli import main
from casp_pl.models import load
from casp_pl.models.streamed import load_streamed
from casp_pl.pipeline.launch import leave

free = (64 << 30, 400_000)[int(os.environ["RANK"])]  # the model has 250 kB: the second process alone would stream it
virtual_memory = psutil.virtual_memory
psutil.virtual_memory = lambda: virtual_memory()._replace(available=free)
opened = []
load.load_streamed = lambda *places, **how: opened.append(places) or load_streamed(*places, **how)
code = main(sys.argv[1:])
assert len(opened) == 1, "not streamed"
leave(code)
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
    wait_for_first_block(tmp_path / "run", first)
    family = psutil.Process(first.pid)
    (second,) = [child for child in family.children() if "casp_pl" in " ".join(child.cmdline())]
    (family, second)[victim].send_signal(signal.SIGKILL)
    second.wait(60)  # raises where it lives on
    assert first.wait(60) == -signal.SIGKILL if victim == 0 else first.wait(60) in (RESOURCES, -signal.SIGKILL)
    finish(recipe, tmp_path / "run", 1)
    assert_equal_runs(alone, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_survivor_of_two_says_why_and_ends_with_5(
    victim: int,
    recipe: list[str],
    start_together: Callable[..., list[subprocess.Popen[bytes]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As under torchrun, where no process has started the other."""
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch tells of its lost store with frames of C++
    processes = start_together(command(recipe, tmp_path / "run", 2)[1:])
    wait_for_first_block(tmp_path / "run", processes[0])
    processes[victim].send_signal(signal.SIGKILL)
    _, errors = processes[1 - victim].communicate(timeout=60)
    assert processes[1 - victim].returncode == RESOURCES, errors.decode()
    assert "the same command goes on from" in errors.decode()
    assert len([line for line in errors.splitlines() if not line.startswith(b"warning:")]) <= 3
    processes[victim].communicate()


FAILING = """
import sys
from casp_pl.cli import main
from casp_pl.errors import NumericsError
from casp_pl.pipeline import run
from casp_pl.pipeline.launch import leave
from casp_pl.processes import process_rank

def failing(*arguments, **keywords):
    if process_rank() in {failing}:
        raise NumericsError("the blocks are broken\\nand so\\nis the rest")
    return quantize(*arguments, **keywords)

quantize, run.quantize_blocks = run.quantize_blocks, failing
leave(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1)])
def test_one_error_is_told_with_its_code_whichever_process_it_is_of(
    failing: tuple[int, ...], recipe: list[str], tmp_path: Path
) -> None:
    """The first process starts the other with the same command; Lightning kills it where that ends first."""
    (tmp_path / "failing.py").write_text(FAILING.format(failing=failing))
    arguments = [sys.executable, str(tmp_path / "failing.py"), *command(recipe, tmp_path / "run", 2)[3:]]
    environment = os.environ | SINGLE_THREAD | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    said = [line for line in done.stderr.splitlines() if not line.startswith("warning:")]
    assert said == ["the blocks are broken", "and so", "is the rest"]
    assert done.returncode == 4


SIGNALLED = """
import os, signal, sys
from casp_pl.cli import main
from casp_pl.modules import BlockwiseModule
from casp_pl.pipeline.launch import leave
from casp_pl.processes import process_rank

def signalled(self, batch, batch_idx):
    if self.global_step == 1 and process_rank() in {signalled}:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, batch, batch_idx)

step, BlockwiseModule.training_step = BlockwiseModule.training_step, signalled
leave(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [(0,), (1,), (0, 1)])
def test_sigterm_in_block_tuning_ends_all_processes_at_once(
    signalled: tuple[int, ...],
    recipe: list[str],
    alone: Path,
    tmp_path: Path,
    start_together: Callable[..., list[subprocess.Popen[bytes]]],
) -> None:
    """As under torchrun and SLURM, where no process has started the other; the other waits for gradients, in C."""
    script = SIGNALLED.replace("{signalled}", str(signalled))
    processes = start_together(["-c", script, *command(recipe, tmp_path / "run", 2)[3:]])
    codes = [process.wait(200) for process in processes]
    errors = [process.communicate()[1].decode() for process in processes]
    assert codes == [143, 143], errors
    assert sum("the same command goes on" in error for error in errors) == 1, errors
    assert not any("Traceback" in error for error in errors), errors
    finish(recipe, tmp_path / "run", 1)
    assert_equal_runs(alone, tmp_path / "run")
