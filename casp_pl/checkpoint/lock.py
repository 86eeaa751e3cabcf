"""One process at a time: a lock that the kernel frees when its holder dies, however it dies."""

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from casp_pl.errors import ResourceError

__all__ = ["hold_lock"]

_LOG = logging.getLogger(__name__)
_ORPHAN_SECONDS = 10.0  # forked data workers of a killed process hold its lock until they notice, about 5 s


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which names its holder's process id, for the time of the block.

    Raises:
        ResourceError: another process holds it, or the file cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ResourceError(f"Cannot write {path}: {error.strerror}.\nGive a directory that can be written.") from error
    try:
        _acquire(descriptor, path)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path) -> None:
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                _LOG.warning("%s: this file system has no locks; do not start a second run there", path.parent)
                return
        holder = _process_id(descriptor)
        if holder is None or _is_alive(holder) or time.monotonic() > deadline:
            named = "another process" if holder is None else f"process {holder}"
            raise ResourceError(
                f"{path.parent} is in use by {named}.\nWait for it, stop it, or give another directory."
            )
        time.sleep(0.2)


def _process_id(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).strip()
    return int(text) if text.isdigit() else None


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
