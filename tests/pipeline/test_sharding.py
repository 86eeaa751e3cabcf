"""The end-to-end stage on two real processes that divide the model: losses and model of one, also after a stop."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from casp_pl import load_compressed
from casp_pl.cli import main

Start = Callable[..., list[subprocess.Popen[bytes]]]
Finish = Callable[..., None]

STEPS, STOPPED_AT, SIGNALLED_AT = 9, 5, 4  # an epoch is seven batches
TIMEOUT = 300

DRIVER = """
import os, signal, sys
from casp_pl.cli import main
from casp_pl.modules import EndToEndModule
from casp_pl.pipeline.launch import leave

step = EndToEndModule.training_step

def stopping(self, batch, batch_idx):
    if self.global_step == {stopped_at}:
        raise OSError("the plug was pulled")
    return step(self, batch, batch_idx)

def signalled(self, batch, batch_idx):
    if self.global_step == {signalled_at} and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, batch, batch_idx)

for strategy, folder, how in {runs}:
    arguments = [*{arguments}, "--trainer.devices", "2", "--trainer.strategy", strategy, "--run_dir", folder]
    if how != "whole":
        EndToEndModule.training_step = stopping if how == "stopped" else signalled
        assert main(arguments) == (1 if how == "stopped" else 143), (strategy, folder)
        if how == "signalled":
            assert os.listdir(folder + "/end_to_end/steps") == [f"{{{signalled_at} + 1:06d}}"]
        EndToEndModule.training_step = step
    assert main(arguments) == 0, (strategy, folder)
leave(0)
"""


def arguments(recipe: list[str]) -> list[str]:
    """A fit whose end-to-end stage saves after every second step; bfloat16 would round what each process adds."""
    search = [
        "--quantizer.init_args.max_rounds",
        "1",
        "--quantizer.init_args.kmeans_iterations",
        "2",
        "--codebook_update.every",
        "2",
    ]
    few = ["--evaluation.questions", "6", "--evaluation.text_tokens", "128", "--data.batch_size", "4"]
    stage = ["--end_to_end.steps", str(STEPS), "--end_to_end.checkpoint_every", "2", "--end_to_end.lr", "0.003"]
    return ["fit", *recipe, *search, *few, *stage, "--trainer.precision", "32-true"]


def before_the_stage(finished: Path, folder: Path) -> Path:
    """A copy of a run as it was before its end-to-end stage."""
    shutil.copytree(finished, folder)
    for made in ("end_to_end", "model", "tensorboard"):
        shutil.rmtree(folder / made)
    (folder / "stages/end_to_end.json").unlink()
    return folder


@pytest.fixture(scope="module")
def alone(recipe: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main([*arguments(recipe), "--run_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def divided(recipe: list[str], alone: Path, start_together: Start, finish_together: Finish) -> Path:
    """Folder of the runs STRATEGY-whole, and -stopped and -signalled: these two end in mid-epoch and go on."""
    runs = []
    for strategy in ("ddp", "fsdp", "fsdp2"):
        for how in ("whole", "stopped", "signalled"):
            folder = before_the_stage(alone, alone.parent / f"{strategy}-{how}")
            runs.append((strategy, str(folder), how))
    script = DRIVER.format(stopped_at=STOPPED_AT, signalled_at=SIGNALLED_AT, runs=runs, arguments=arguments(recipe))
    finish_together(start_together(["-c", script]), timeout=2 * TIMEOUT)
    return alone.parent


def losses(run: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("end_to_end")]
    return {tag: [event.value for event in events.Scalars(tag)] for tag in tags}


def logits(run: Path) -> torch.Tensor:
    model, processor = load_compressed(run / "model")
    tokens = processor.tokenizer("is there a red shape?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=tokens).logits)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    files = [run / "model/model.safetensors", *sorted((run / "end_to_end").glob("*.safetensors"))]
    return {f"{path.name}/{name}": tensor for path in files for name, tensor in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2"])
def test_divided_training_is_that_of_one_process(strategy: str, alone: Path, divided: Path) -> None:
    mine, theirs = losses(alone), losses(divided / f"{strategy}-whole")
    assert {len(values) for values in mine.values()} == {STEPS, 5}, "every step, every validation"
    for tag, values in mine.items():
        assert theirs[tag] == pytest.approx(values, rel=1e-5), tag
    assert max(mine["end_to_end/train_kl"]) > 1.001 * min(mine["end_to_end/train_kl"]), "the steps change something"
    one, other = tensors(alone), tensors(divided / f"{strategy}-whole")
    assert one.keys() == other.keys()
    for name, tensor in one.items():  # sums in another order: a number between two of float16 may go to the other one
        torch.testing.assert_close(other[name].float(), tensor.float(), rtol=2**-10, atol=1e-6, msg=name)
    unequal = sum(int((other[name] != tensor).sum()) for name, tensor in one.items() if tensor.dtype == torch.float16)
    assert unequal <= 1e-3 * sum(tensor.numel() for tensor in one.values() if tensor.dtype == torch.float16)
    torch.testing.assert_close(logits(divided / f"{strategy}-whole"), logits(alone), rtol=0, atol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2"])
@pytest.mark.parametrize("how", ["stopped", "signalled"])
def test_a_stop_in_mid_epoch_changes_nothing(strategy: str, how: str, divided: Path) -> None:
    """A signal to one process of the two ends both behind the same step."""
    whole, stopped = tensors(divided / f"{strategy}-whole"), tensors(divided / f"{strategy}-{how}")
    assert [name for name in whole if not torch.equal(whole[name], stopped[name])] == []
    assert not (divided / f"{strategy}-{how}/end_to_end/steps").exists(), "checkpoints go when the stage is done"


@pytest.mark.slow
def test_a_killed_process_stops_the_other_and_the_stage_goes_on(
    recipe: list[str], alone: Path, divided: Path, start_together: Start, finish_together: Finish
) -> None:
    folder = before_the_stage(alone, alone.parent / "killed")
    command = ["-m", "casp_pl", *arguments(recipe), "--trainer.devices", "2", "--trainer.strategy", "fsdp2"]
    command += ["--run_dir", str(folder)]
    first, second = start_together(command)
    deadline = time.monotonic() + TIMEOUT
    while not _recorded(folder) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    second.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    assert first.returncode not in (0, None)
    assert _recorded(folder), "the kill came too late to prove anything"
    for process in (first, second):
        process.communicate(timeout=60)  # closes what they wrote to
    finish_together(start_together(command))
    whole, resumed = tensors(divided / "fsdp2-whole"), tensors(folder)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def _recorded(folder: Path) -> bool:
    """Whether the manifest, which is replaced in one step, has a checkpoint of the stage."""
    names = json.loads((folder / "manifest.json").read_text())["artifacts"]
    return any(name.startswith("end_to_end/steps") for name in names)
