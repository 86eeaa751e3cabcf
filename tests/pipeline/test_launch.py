"""Processes that worked together end well: the backend's threads are over before the interpreter is."""

import subprocess
from collections.abc import Callable

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


def test_who_ends_well_leaves_the_others_before_python_ends(
    start_together: Callable[..., list[subprocess.Popen[bytes]]], finish_together: Callable[..., None]
) -> None:
    processes = start_together(["-c", ENDING], 2)
    finish_together(processes, 60)
    assert [process.returncode for process in processes] == [0, 0]
