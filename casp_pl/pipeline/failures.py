"""What a user is told of an exception, and with which exit code the command ends."""

from pathlib import Path
from typing import NamedTuple

from casp_pl.checkpoint.atomic import is_disk_full, resource_error
from casp_pl.errors import CaspError, ResourceError, StopRun
from casp_pl.models.micro_batch import is_out_of_memory
from casp_pl.processes import is_lost_connection, lost_process

__all__ = ["Failure", "failure_of"]


class Failure(NamedTuple):
    """How a command ends.

    Attributes:
        message: at most three lines.
        exit_code: 2 configuration, 3 input, 4 numerics, 5 resources, 6 integrity, 130/143 signals, 1 a bug.
    """

    message: str
    exit_code: int


def failure_of(error: BaseException) -> Failure:
    """What is to be told of any exception; of one that nobody expected only its first line."""
    known = error if isinstance(error, CaspError | StopRun) else _resource_error(error)
    if known is not None:
        return Failure("\n".join(str(known).splitlines()[:3]), known.exit_code)
    # anything else is a bug of ours: say so in one line, the traceback on demand
    reason = str(error).splitlines()[0] if str(error) else ""
    return Failure(
        f"Unexpected {type(error).__name__}: {reason}\nRun again with --verbose for the traceback.", exit_code=1
    )


def _resource_error(error: BaseException) -> ResourceError | None:
    """Memory that ran out, disks that are full, processes that are lost, wherever it happened; else None."""
    if is_lost_connection(error):
        return lost_process(error)
    if isinstance(error, Exception) and is_out_of_memory(error):
        reason = (str(error).splitlines() or [""])[0][:200]
        return ResourceError(f"Out of memory. {reason}\nLower data.batch_size, data.max_length or data.samples.")
    if isinstance(error, OSError) and is_disk_full(error):
        return resource_error(error, Path(error.filename or "a file of the run directory"))
    return None
