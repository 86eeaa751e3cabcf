"""How long each stage of a run has worked, in all processes that it took one after the other.

It is kept whenever a piece of a stage (a linear, a window of blocks, a checkpoint) is finished, so that a run that is
killed forgets the time of no piece that the next process finds. Two files take turns: the older one is deleted when the
newer one is recorded, so a kill in between leaves one that counts.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

from casp_pl.checkpoint import RunDirectory

__all__ = ["WorkTime"]

_FILES = ("stages/work_seconds/0.json", "stages/work_seconds/1.json")


class WorkTime:
    """Seconds of finished work by stage, without what reading it again takes.

    The processes of a run make the same calls; the figures that are kept are those of the first.

    Args:
        run: keeps them.
        clock: seconds that only ever grow.

    Attributes:
        seconds: stage -> seconds of its finished pieces.
    """

    def __init__(self, run: RunDirectory, clock: Callable[[], float] = time.monotonic) -> None:
        self.run = run
        self._clock = clock
        kept: list[dict[str, Any]] = [run.read_json(name) for name in _FILES if run.has(name)]
        last: dict[str, Any] = max(kept, key=itemgetter("number"), default={"number": 0, "seconds": {}})
        self.seconds: dict[str, float] = last["seconds"]
        self._number: int = last["number"]
        self._stage, self._since, self._recalled = "", 0.0, False
        self._discard_older()

    @contextmanager
    def stage(self, name: str, *, afresh: bool = False) -> Iterator[None]:
        """Around the work of a stage; what follows its last piece counts if nothing was raised.

        Args:
            name: of the stage.
            afresh: whether it begins with nothing, so that what earlier processes worked at it was in vain.
        """
        if afresh:
            self.seconds.pop(name, None)
        self._stage, self._since, self._recalled = name, self._clock(), False
        yield
        if not self._recalled:
            self.done()

    def done(self) -> None:
        """A piece of the current stage is finished and kept."""
        now = self._clock()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._since, self._recalled = now, False
        self._number += 1
        self.run.write_json(_FILES[self._number % 2], {"number": self._number, "seconds": self.seconds})
        self._discard_older()

    def recall(self) -> None:
        """A piece was there already: the time since the one before counts for nothing."""
        self._since, self._recalled = self._clock(), True

    def _discard_older(self) -> None:
        self.run.discard(_FILES[(self._number + 1) % 2])
