"""Processes that worked together end well: no thread of the backend meets the end of the interpreter."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from casp_pl.pipeline.launch import processes_of, sharing_processes

# exit handlers run last come, first served
ENDING = """
import atexit, os
import torch.distributed as dist
from casp_pl.pipeline.launch import launched
from casp_pl.processes import of_all

atexit.register(lambda: os._exit(7 if dist.is_initialized() else 0))
with launched({"devices": 2, "accelerator": "cpu"}):
    assert of_all(int(os.environ["RANK"])) == [0, 1]
assert dist.is_initialized()
"""

LEAVING = """
import atexit, os, sys
from casp_pl.pipeline.launch import launched, leave

class Last:
    def __del__(self, write=os.write):
        write(2, b"interpreter ended\\n")

last = Last()
atexit.register(lambda: os.write(2, b"handlers ran\\n"))
count = int(os.environ.get("WORLD_SIZE", "1"))
with launched({"devices": count, "accelerator": "cpu"}):
    print("said")
leave(3)
"""


def test_who_ends_well_leaves_the_others_before_python_ends(
    start_together: Callable[..., list[subprocess.Popen[bytes]]], finish_together: Callable[..., None]
) -> None:
    processes = start_together(["-c", ENDING], 2)
    finish_together(processes, 60)
    assert [process.returncode for process in processes] == [0, 0]


def test_only_who_worked_alone_ends_the_interpreter(
    start_together: Callable[..., list[subprocess.Popen[bytes]]],
) -> None:
    """What a group's threads would meet there: see `leave`. Everything else happens in both cases."""
    alone = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, timeout=60)
    assert (alone.returncode, alone.stdout) == (3, b"said\n")
    assert alone.stderr.splitlines()[-2:] == [b"handlers ran", b"interpreter ended"]
    for process in start_together(["-c", LEAVING], 2):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 3
        assert errors.splitlines()[-1] == b"handlers ran"


@pytest.mark.parametrize(
    ("accelerator", "devices", "processes"),
    [
        ("gpu", -1, 4),
        ("gpu", "-1", 4),
        ("gpu", "auto", 4),
        ("auto", -1, 4),
        ("auto", "auto", 4),
        ("gpu", "0,2", 2),
        ("gpu", [0, 2, 3], 3),
        ("gpu", 8, 8),
        ("gpu", None, 1),
        ("cpu", "auto", 1),
        ("cpu", 3, 3),
    ],
)
def test_processes_are_counted_as_lightning_will_start_them(
    accelerator: str, devices: Any, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    trainer = {"accelerator": accelerator, "devices": devices, "num_nodes": 2}
    assert sharing_processes(trainer) == processes
    assert processes_of(trainer) == 2 * processes


@pytest.mark.parametrize("devices", [-1, "auto", "0,1"])
def test_gpus_that_are_not_here_cannot_be_counted(devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert processes_of({"accelerator": "gpu", "devices": devices}) == 1
