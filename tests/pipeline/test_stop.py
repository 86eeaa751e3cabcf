"""A signal that arrives while a finalizer runs is not lost."""

import os
import signal
import time

import pytest

from casp_pl.cli import _stop
from casp_pl.errors import StopRun


def test_a_stop_inside_a_finalizer_comes_after_it() -> None:
    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    def work() -> None:
        Finalized()  # dropped at once
        time.sleep(1)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    signal.signal(signal.SIGTERM, _stop)
    try:
        with pytest.raises(StopRun):
            work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
