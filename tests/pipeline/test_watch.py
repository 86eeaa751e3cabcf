"""Where one process fails or dies, all end within seconds; one of them says why, with the right exit code.

Real processes on gloo. Some do not return from a call to C, as one does not that waits in NCCL for a dead neighbour.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 20.0
SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}

# forks, because the imports take most of the time; two processes a scenario, which know each other as torchrun's do
DRIVER = """
import ctypes, json, os, signal, socket, sys, tempfile, time
import torch, torch.distributed as dist
from casp_pl.cli import _stop
from casp_pl.errors import NumericsError, StopRun
from casp_pl.pipeline.failures import failure_of
from casp_pl.pipeline.launch import die_with_parent
from casp_pl.pipeline.watch import ToldByFirstError, _Watch, watched
from casp_pl.processes import wait_for_all

def act(what):
    wait_for_all()
    if what == "fails slowly":  # descheduled between telling and hearing
        heard_by = _Watch._heard_by
        _Watch._heard_by = lambda *given: time.sleep(1) or heard_by(*given)
    if what == "hears slowly":
        note_heard = _Watch._note_heard
        _Watch._note_heard = lambda watch: time.sleep(1) or os.write(2, b"heard\\n") and note_heard(watch)
    if what.startswith("fails"):
        raise NumericsError("the tensor is broken\\nin three\\nlines")
    if what == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stuck":
        ctypes.CDLL(None).sleep(60)
    if what == "works":
        time.sleep(60)

def process(rank, port, what, errors):
    os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    signal.signal(signal.SIGTERM, _stop)
    dist.init_process_group("gloo")
    try:
        with watched():
            act(what)
        return 0
    except ToldByFirstError as told:
        return told.exit_code
    except (Exception, StopRun) as error:
        message, code = failure_of(error)
        print(message, file=sys.stderr, flush=True)
        return code

def together(acts):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    errors = tempfile.mkstemp()[1]
    children = []
    second = acts[1].removeprefix("child ")
    for rank, what in enumerate(acts[:1] if acts[1] != second else acts):
        child = os.fork()
        if child == 0:
            if acts[1] != second and os.fork() == 0:  # started by the first process, as Lightning does it
                die_with_parent()
                os._exit(process(1, port, second, errors))
            os._exit(process(rank, port, what, errors))
        children.append(child)
    start = time.monotonic()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return {"codes": codes, "seconds": time.monotonic() - start, "errors": open(errors).read()}

def orphan():
    "Whether a child that holds the interpreter's lock in C ends with its parent."
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            die_with_parent()
            os.write(writing, b"x")
            ctypes.PyDLL(None).sleep(60)
        time.sleep(60)
    os.close(writing)
    os.read(reading, 1)
    start = time.monotonic()
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    os.read(reading, 1)  # returns when nobody can write any more
    return {"seconds": time.monotonic() - start}

done = {"/".join(acts): together(acts) for acts in SCENARIOS}
print(json.dumps(done | {"orphan": orphan()}))
"""
FAILED, LOST, GONE = (
    "the tensor is broken\nin three\nlines\n",
    "hears nothing of the others",
    "The first process is gone",
)
SCENARIOS: dict[str, tuple[list[int], str]] = {
    "fails/waits": ([4, 4], FAILED),
    "waits/fails": ([4, 4], FAILED),
    "fails/fails": ([4, 4], FAILED),
    "stuck/fails": ([4, 4], FAILED),
    "fails/stuck": ([4, 4], FAILED),
    "stuck/fails slowly": ([4, 4], FAILED),
    "fails/fails slowly": ([4, 4], FAILED),
    "fails slowly/fails": ([4, 4], FAILED),
    "works/fails": ([4, 4], FAILED),
    "fails/child hears slowly": ([4], "heard\n" + FAILED),
    "waits/child dies": ([5], LOST),
    "fails/hears slowly": ([4, 4], "heard\n" + FAILED),
    "waits/dies": ([5, -9], LOST),
    "dies/stuck": ([-9, 5], GONE),
    "waits/waits": ([0, 0], ""),
}


@pytest.fixture(scope="module")
def results() -> Mapping[str, Any]:
    script = f"SCENARIOS = {[name.split('/') for name in SCENARIOS]}\n{DRIVER}"
    environment = os.environ | SINGLE_THREAD | {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results: Mapping[str, Any] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_all_end_and_one_says_why(scenario: str, results: Mapping[str, Any]) -> None:
    """What the first process does, and the second; `stuck` is a call to C, in which Python sees no signal."""
    codes, words = SCENARIOS[scenario]
    ended = results[scenario]
    assert ended["codes"] == codes, ended["errors"]
    # beside a child that was killed the first process has not long to live: Lightning looks every 5 s
    assert ended["seconds"] < (3.0 if "child dies" in scenario else SECONDS)
    if words in (LOST, GONE):
        assert words in ended["errors"]
        assert len(ended["errors"].splitlines()) <= 3
    else:
        assert ended["errors"] == words


def test_the_kernel_ends_a_process_with_the_one_that_started_it(results: Mapping[str, Any]) -> None:
    assert results["orphan"]["seconds"] < SECONDS
