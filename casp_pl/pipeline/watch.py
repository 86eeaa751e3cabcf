"""Where one process of several fails, all end within seconds, and the first one says why, once, with its exit code.

A process that fails writes why into the store that torch's processes meet at, unless another was faster. A thread in
every process looks there: it interrupts its main thread, and ends the process if that does not return, because it waits
in NCCL for a process that is no more. A store that does not answer means that the first process is gone: that one ends
when all others have heard why, or after some seconds.

A process that was killed writes nothing: gloo tells its neighbours at once; else those who started it (Lightning's
first process, torchrun, srun) end the others.
"""

import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from uuid import uuid4

import psutil
import torch.distributed as dist

from casp_pl.errors import CaspError, StopRun
from casp_pl.pipeline.failures import Failure, failure_of
from casp_pl.processes import of_all, process_count, rank_and_count, said_by_first, wait_for_all
from casp_pl.stopping import at_once

__all__ = ["ToldByFirstError", "watched"]

_POLL = 0.5  # seconds
_GRACE = 5.0  # seconds that a main thread has to return
_FIRST_IS_GONE = Failure("The first process is gone; the same command goes on from what is finished.", exit_code=5)


class ToldByFirstError(Exception):
    """This process ends because one has failed, and has nothing to say: the first process does."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process says why")
        self.exit_code = exit_code


class _OtherFailedError(CaspError):
    """What another process failed of, in the first one, which tells."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.exit_code = failure.exit_code


@contextmanager
def watched() -> Iterator[None]:
    """Around all that the processes of a run do together.

    Raises:
        ToldByFirstError: instead of an error that the first process tells.
        CaspError: in the first process, what another one failed of.
    """
    if process_count() == 1:
        yield
        return
    watch = _Watch()
    try:
        yield
        wait_for_all()  # none ends well before all have
    except BaseException as error:
        watch.close()
        raise watch.verdict(error) from error
    finally:
        watch.close()


class _Watch:
    def __init__(self) -> None:
        self.rank, self.count = rank_and_count()
        places = of_all((platform.node(), os.getpid(), os.getppid()))
        machine, own, parent = places[self.rank]
        self.started_by_another = (machine, parent) in {(host, process) for host, process, _ in places}
        self.children = {
            rank: process for rank, (host, process, starter) in enumerate(places) if (host, starter) == (machine, own)
        }
        self.run = f"casp_pl/{said_by_first(uuid4().hex)}"
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # documented, but not in __all__
        self.store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
        self._found: Failure | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="casp_pl-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The main thread has returned."""
        with suppress(StopRun):  # that of `_look`, sent a moment ago
            self._done.set()
            self._thread.join(_GRACE)

    def verdict(self, error: BaseException) -> BaseException:
        """What to raise instead of `error`: what is told is told once, of the process that failed first."""
        if self._found is not None:
            if self.rank == 0:
                self._heard_by_others()
            return self._other_failed(self._found)
        own = failure_of(error)
        try:
            teller, told = self._tell(own)
        except dist.DistError:  # the store is gone, and who else could tell
            return error
        heard = self._heard_by_others() if self.rank == 0 else self._heard_by([0])
        with suppress(dist.DistError):
            self._note_heard()  # where all fail at once, as after a signal, the first waits for no `_look` in vain
        speaks = teller == self.rank and (self.rank == 0 or not heard)
        return error if speaks else self._other_failed(told)

    def _other_failed(self, failure: Failure) -> Exception:
        if self.rank == 0 or failure is _FIRST_IS_GONE:
            return _OtherFailedError(failure)
        # Lightning would kill the first process, which started this one, before it has told and ended with the code
        return ToldByFirstError(0 if self.started_by_another else failure.exit_code)

    def _tell(self, failure: Failure) -> tuple[int, Failure]:
        """Who failed first and of what: this process, if none did before."""
        value = self.store.compare_set(f"{self.run}/failure", "", json.dumps([self.rank, *failure]))
        if self.rank == 0:
            self._note_heard()
        rank, message, code = json.loads(value)
        return rank, Failure(message, code)

    def _look(self) -> None:
        while not self._done.wait(_POLL):
            self._found = self._told()
            if self._found is not None:
                self._end(self._found)
                return

    def _told(self) -> Failure | None:
        """What another process has told that it failed of."""
        try:
            if not self.store.check([f"{self.run}/failure"]):
                return None
            _, message, code = json.loads(self.store.get(f"{self.run}/failure"))
            self._note_heard()
        except dist.DistError:
            return _FIRST_IS_GONE
        return Failure(message, code)

    def _end(self, failure: Failure) -> None:
        with at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            if self._done.wait(_GRACE):
                return
        if self.rank == 0 or failure is _FIRST_IS_GONE:
            os.write(sys.stderr.fileno(), f"{failure.message}\n".encode())
        os._exit(failure.exit_code)

    def _note_heard(self) -> None:
        self.store.set(f"{self.run}/heard/{self.rank}", "")

    def _heard_by_others(self) -> bool:
        """The store ends with the first process, where a teller waits for an answer, and others look, until then.

        Nobody waits for a child that has died: Lightning is about to kill the process that started it.
        """
        dead = {rank for rank, process in self.children.items() if not _lives(process)}
        return self._heard_by(sorted(set(range(self.count)) - dead - {self.rank}))

    def _heard_by(self, ranks: Sequence[int]) -> bool:
        try:
            self.store.wait([f"{self.run}/heard/{rank}" for rank in ranks], timedelta(seconds=_GRACE))
        except dist.DistError:
            return False
        return True


def _lives(process: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False
