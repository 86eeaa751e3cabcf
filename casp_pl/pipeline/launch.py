"""The processes of a run: started here on one machine, or before by torchrun or SLURM with the same command on each."""

import atexit
import ctypes
import os
import platform
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.accelerators.cuda import CUDAAccelerator
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException

from casp_pl.errors import ConfigError
from casp_pl.pipeline.strategies import STRATEGIES, several
from casp_pl.pipeline.watch import watched
from casp_pl.processes import is_first, process_count

__all__ = ["accelerator_type", "die_with_parent", "launched", "leave", "processes_of", "sharing_processes"]

_BACKEND = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # some of what processes say lies on the CPU everywhere
_PATIENCE = timedelta(hours=1)  # with a process that works alone, on a linear at most, or writing the model
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl


def accelerator_type(trainer: Mapping[str, Any]) -> str:
    """`cuda` or `cpu`: what Lightning makes of `trainer.accelerator`."""
    chosen = trainer.get("accelerator") or "auto"
    return "cuda" if chosen in ("gpu", "cuda") or (chosen == "auto" and torch.cuda.is_available()) else "cpu"


def processes_of(trainer: Mapping[str, Any]) -> int:
    """How many processes a run has: those that run, or before `launched` those that it will start."""
    return process_count() if process_count() > 1 else _on_each(trainer) * _machines(trainer)


def sharing_processes(trainer: Mapping[str, Any]) -> int:
    """How many of them share one machine."""
    return -(-processes_of(trainer) // _machines(trainer))


def _machines(trainer: Mapping[str, Any]) -> int:
    return int(trainer.get("num_nodes") or 1)


def _on_each(trainer: Mapping[str, Any]) -> int:
    """What `trainer.devices` says; -1 and auto are as many as Lightning finds: all GPUs, or one process on a CPU."""
    devices: Any = trainer.get("devices")
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return max(1, len(devices))
    if str(devices).isdigit():
        return max(1, int(devices))
    if devices is None or accelerator_type(trainer) == "cpu":
        return 1
    try:
        gpus = CUDAAccelerator.parse_devices(CUDAAccelerator.auto_device_count() if devices == "auto" else devices)
    except (MisconfigurationException, ValueError):
        return 1  # they are not here: `fit` will be refused, but `plan` is not
    return max(1, len(gpus or ()))


@contextmanager
def launched(trainer: Mapping[str, Any]) -> Iterator[None]:
    """Start the run's other processes where `trainer` wants several, and join them; inside, they work together.

    Raises:
        ConfigError: a strategy that does not exist here, or torchrun started more processes than `trainer` says.
        ToldByFirstError: another process has failed, see `watched`.
    """
    _launch(trainer)
    with watched():
        yield
    if process_count() > 1:
        # waits for the group's threads; not after a failure, when these may wait for ever
        atexit.unregister(dist.destroy_process_group)  # where one process runs several commands
        atexit.register(dist.destroy_process_group)


def _launch(trainer: Mapping[str, Any]) -> None:
    devices, nodes = trainer.get("devices"), _machines(trainer)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    strategy = trainer.get("strategy") or "auto"
    if not several(trainer):
        if started > 1:
            raise ConfigError(f"{started} processes were started, but trainer.devices is 1: set it to {started}.")
        return
    if strategy not in STRATEGIES:
        known = ", ".join(STRATEGIES[1:])
        raise ConfigError(f"trainer.strategy: {strategy} is not for several processes here; set it to one of {known}.")
    ddp = DDPStrategy(process_group_backend=_BACKEND[accelerator_type(trainer)], timeout=_PATIENCE)
    accelerator = trainer.get("accelerator") or "auto"
    try:
        Fabric(accelerator=accelerator, devices=devices or 1, num_nodes=nodes, strategy=ddp).launch()
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error
    if not is_first():
        die_with_parent()


def leave(code: int) -> NoReturn:
    """End this process; one that worked with others without the end of its interpreter.

    A thread of gloo lets go of tensors when what it did is long over, wants the interpreter for that, and aborts the
    process if the interpreter is ending. `destroy_process_group` waits for these threads, but not for those of a group
    that something else holds, as torch does after training under FSDP. Exit handlers run in both cases.

    Args:
        code: the exit code.
    """
    if process_count() == 1:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def die_with_parent() -> None:
    """Have the kernel end this process with the one that started it, whatever it waits for; on Linux only."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
