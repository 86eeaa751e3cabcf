"""SIGTERM and SIGINT where work may be brought to a good end first: the first one is put off, the second one is not."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from casp_pl.processes import is_first

__all__ = ["LateStop", "at_once"]

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2  # not sys.stderr: a handler may run in the middle of a print, which cannot be entered twice
_urgent = threading.Event()


@contextmanager
def at_once() -> Iterator[None]:
    """Inside, `LateStop` puts nothing off, whichever thread of this process sends the signal."""
    _urgent.set()
    try:
        yield
    finally:
        _urgent.clear()


class LateStop:
    """Between `begin` and `end` the first SIGTERM or SIGINT is only noted; the second does what it did before.

    Handlers belong to the main thread: in another one nothing changes.

    Attributes:
        number: the signal that came; 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[signal.Signals, Any] = {}
        self._changed = False

    def begin(self) -> None:
        """From now on a signal is noted."""
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in _NUMBERS}
            ignored = (None, signal.SIG_IGN)  # None is one that Python did not set and cannot put back
            self._before = {number: handler for number, handler in handlers.items() if handler not in ignored}
            for number in self._before:
                signal.signal(number, self._note)
            self._changed = True

    def end(self) -> None:
        """From now on signals do what they did before."""
        if self._changed:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._changed = False

    def _note(self, number: int, _: FrameType | None) -> None:
        self.end()
        if _urgent.is_set():
            os.kill(os.getpid(), number)
            return
        self.number = number
        if is_first():
            name = signal.Signals(number).name
            line = f"{name}: stops after the step under way, which is saved; a second signal stops at once.\n"
            with suppress(OSError):  # nobody reads it any more
                os.write(_STDERR, ("\n" * os.isatty(_STDERR) + line).encode())  # below the bar of a terminal
