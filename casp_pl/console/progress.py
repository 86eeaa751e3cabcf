"""Progress of a whole run and of its current stage: two bars on a terminal, a line now and then elsewhere.

What is done gets a row each, in columns: blocks, stages. How far the run is, is told elsewhere than on a terminal only
when nothing else has been said for a minute, or, with `verbose`, at every 2 % of the run.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from casp_pl.console.prose import print_text
from casp_pl.console.tables import make_console

__all__ = ["RunProgress"]

_STEP = 0.02  # of the run: with `verbose` one plain line for each, even if `interval` has not passed
_NAME_WIDTH = 16
_LABEL_WIDTH, _TIME_WIDTH = 12, 8


class RunProgress:
    """Shows how far a run of several stages has come and how long it will take.

    The stages' weights are expected seconds, or anything proportional: the time that the finished share of them really
    took gives the time that is left. What an earlier run has done (`recall`, `skip`) moves the bars, but neither it nor
    the time that reading it takes says how fast this run is. Use it as a context manager.

    Args:
        stages: weight of every stage, in the order in which they run.
        console: where to show it, standard output by default.
        enabled: False shows nothing, as on all ranks but the first.
        interval: seconds without a line after which one tells how far the run is.
        verbose: tell more: how far the run is at every 2 % and at the ends of each stage, and `detail`.
        clock: seconds that only ever grow.
    """

    def __init__(
        self,
        stages: Mapping[str, float],
        *,
        console: Console | None = None,
        enabled: bool = True,
        interval: float = 60.0,
        verbose: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.weights = dict(stages)
        self.console = make_console() if console is None else console
        self.enabled = enabled
        self.interval = interval
        self.verbose = verbose
        self._clock = clock
        self._finished: dict[str, float] = {}  # stage -> weight that was worked off here; 0 where it was skipped
        self._stage, self._steps, self._done, self._recalled, self._note = "", 1.0, 0.0, 0.0, ""
        self._started = self._stage_started = self._moved = clock()
        self._line_share, self._line_time = 0.0, clock()
        self._bars = _Bars(self.console) if enabled and _is_live(self.console) else None

    def __enter__(self) -> Self:
        self._started = self._moved = self._line_time = self._clock()
        if self._bars is not None:
            self._bars.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._show(force=True)
            self._bars.progress.stop()

    @contextmanager
    def stage(self, name: str, steps: float) -> Iterator[None]:
        """Around the work of one stage of so many steps; it counts as finished if nothing was raised."""
        self.start(name, steps)
        yield
        self.finish()

    def start(self, name: str, steps: float) -> None:
        """The stage `name` of so many steps begins.

        Raises:
            ValueError: the run has no such stage.
        """
        self._check(name)
        self._stage, self._steps, self._note = name, max(float(steps), 1e-9), ""
        self._done = self._recalled = 0.0
        self._stage_started = self._moved = self._clock()
        self._show(force=True)

    def advance(self, steps: float = 1.0, note: str = "") -> None:
        """So many steps more are done; `note` is shown behind the stage's name, such as a loss."""
        self._done = min(self._done + steps, self._steps)
        self._note = note
        self._moved = self._clock()
        self._show()

    def recall(self, steps: float = 1.0) -> None:
        """So many steps of the current stage were done by an earlier run; without a say in how fast this one is."""
        before = self._done
        self._done = min(self._done + steps, self._steps)
        self._recalled += self._done - before
        self._note = ""
        self._leave_out()
        self._show()

    def finish(self) -> None:
        """The current stage is done."""
        self._done = self._steps
        self._moved = self._clock()
        self._show(force=True)
        self._finished[self._stage] = self._earned_weight()
        self._stage, self._note = "", ""

    def skip(self, name: str) -> None:
        """A stage that an earlier run completed: done, without a say in how fast this run is.

        Raises:
            ValueError: the run has no such stage.
        """
        self._check(name)
        self._finished[name] = 0.0
        self._done = self._recalled = self._steps
        self._leave_out()
        self.say(f"{name}: complete, from an earlier run")
        if self._bars is not None:
            self._show()

    def _check(self, name: str) -> None:
        if name not in self.weights:
            raise ValueError(f"No stage '{name}' among {', '.join(self.weights)}.")

    def _leave_out(self) -> None:
        """Nothing was earned since the bar moved last: count as if the run, and the stage, had begun later by that."""
        now = self._clock()
        self._started += now - self._moved
        self._stage_started += now - self._moved
        self._moved = now

    def say(self, text: str) -> None:
        """A line of text above the bars, broken between words where the console is too narrow."""
        if self.enabled:
            self._line_time = self._clock()
            print_text(text, self.console)

    def row(self, label: str, *cells: str, time: str) -> None:
        """What is done, in columns; closer together, then below each other, where the console is too narrow."""
        for line in _row_lines(label, cells, time, self.console.width):
            self.say(line)

    def detail(self, label: str, *cells: str, time: str) -> None:
        """A row for those who want to know everything."""
        if self.verbose:
            self.row(label, *cells, time=time)

    @property
    def share(self) -> float:
        """Share of the run that is done, 0 .. 1."""
        done = sum(self.weights[name] for name in self._finished) + self._current_weight()
        return min(done / max(sum(self.weights.values()), 1e-9), 1.0)

    @property
    def seconds_left(self) -> float | None:
        """Expected seconds to the end of the run; None while nothing is known."""
        waiting = sum(weight for name, weight in self.weights.items() if name not in self._finished)
        left = max(waiting - self._current_weight(), 0.0)
        earned = sum(self._finished.values()) + self._earned_weight()
        if left > 0 and earned <= 0:
            return None
        return (self._clock() - self._started) / earned * left if left > 0 else 0.0

    @property
    def _stage_left(self) -> float | None:
        earned, left = self._done - self._recalled, self._steps - self._done
        if left > 0 and earned <= 0:
            return None
        return (self._clock() - self._stage_started) / earned * left if left > 0 else 0.0

    def _current_weight(self) -> float:
        return self.weights[self._stage] * (self._done / self._steps) if self._stage else 0.0

    def _earned_weight(self) -> float:
        """Of the current stage, what was worked off here."""
        return self.weights[self._stage] * (self._done - self._recalled) / self._steps if self._stage else 0.0

    def _show(self, *, force: bool = False) -> None:
        if self._bars is not None:
            name, share = self._stage or "done", self._done / self._steps
            self._bars.show(self.share, self.seconds_left, name, share, self._stage_left, self._note)
        elif self.enabled:
            self._show_line(force)

    def _show_line(self, force: bool) -> None:
        now = self._clock()
        moved = self.verbose and (force or self.share - self._line_share >= _STEP)
        if not moved and now - self._line_time < self.interval:
            return
        self._line_share, self._line_time = self.share, now
        head, tail = f"{100 * self.share:3.0f}% ", f" {self._done:g}/{self._steps:g}"
        left = self.seconds_left
        tail += f", {_clock_text(left)} left" if left is not None else ""
        room = self.console.width - len(head) - len(tail)
        line = head + self._stage[: max(room, 4)] + tail
        if self._note and len(line) + len(self._note) + 2 <= self.console.width:
            line += f"  {self._note}"
        print_text(line, self.console)


class _Bars:
    """The two bars of a terminal."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%", markup=False),
            TextColumn("{task.fields[left]:>7}", markup=False),
            console=console,
            expand=True,
            refresh_per_second=4,
        )
        self.wide = console.width >= 70
        self.run: TaskID = self.progress.add_task(self._name("whole run"), total=1.0, left="")
        self.stage: TaskID = self.progress.add_task(self._name(""), total=1.0, left="")

    def show(
        self, share: float, left: float | None, stage: str, stage_share: float, stage_left: float | None, note: str
    ) -> None:
        """Moves both bars; the note is shown where there is room."""
        self.progress.update(self.run, completed=share, left=_clock_text(left))
        name = self._name(f"{stage}  {note}" if note and self.wide else stage)
        self.progress.update(self.stage, description=name, completed=stage_share, left=_clock_text(stage_left))

    def _name(self, text: str) -> str:
        width = _NAME_WIDTH * 2 if self.wide else _NAME_WIDTH
        return text[:width].ljust(width)


def _row_lines(label: str, cells: Sequence[str], time: str, width: int) -> list[str]:
    wide = "  ".join([label.ljust(_LABEL_WIDTH), *cells, time.rjust(_TIME_WIDTH)])
    close = " ".join([label, *cells, time])
    if len(wide) <= width:
        return [wide]
    if len(close) <= width:
        return [close]
    lines = [label]
    for cell in (*cells, time):
        if len(lines) > 1 and len(lines[-1]) + 2 + len(cell) <= width:
            lines[-1] += f"  {cell}"
        else:
            lines.append(f"  {cell}")
    return lines


def _is_live(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


def _clock_text(seconds: float | None) -> str:
    """H:MM:SS, or dashes while nothing is known."""
    if seconds is None:
        return "-:--:--"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
