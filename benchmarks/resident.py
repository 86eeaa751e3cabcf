"""Resident memory of a piece of work, in a process of its own (Linux)."""

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["peaks_of", "printed_by", "resident_bytes"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peaks_of(work: Callable[[], object]) -> tuple[int, int]:
    """Peak bytes of this process so far, `work` included, and those that `work` adds to what it finds.

    The second is of a peak that starts again before `work`: that of what was done before may be higher.
    """
    earlier, before = _bytes("VmHWM"), resident_bytes()
    _RESET.write_text("5")
    work()
    peak = _bytes("VmHWM")
    return max(earlier, peak), peak - before


def resident_bytes() -> int:
    """Of this process now, without what is free but held: that would be used again, and not be counted."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _bytes("VmRSS")


def printed_by(module: str, *arguments: str) -> Any:
    """What a module prints last when it is run in a new process, as JSON."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _bytes(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
