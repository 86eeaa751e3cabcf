import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from casp_pl.console import RunProgress, make_console, print_table


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def piped(width=120):
    return Console(file=io.StringIO(), width=width, highlight=False)


def lines(console):
    return console.file.getvalue().splitlines()


def test_share_and_time_left_follow_the_weights():
    clock = Clock()
    progress = RunProgress({"a": 10.0, "b": 30.0}, console=piped(), clock=clock)
    with progress:
        assert progress.seconds_left is None
        with progress.stage("a", 5):
            clock.now = 4.0
            progress.advance()
            assert progress.share == pytest.approx(2 / 40)
            assert progress.seconds_left == pytest.approx(4.0 / 2 * 38)
        clock.now = 20.0
        assert progress.share == pytest.approx(0.25)
        assert progress.seconds_left == pytest.approx(60.0)
        with progress.stage("b", 3):
            progress.advance(3)
    assert progress.share == 1.0


def test_a_skipped_stage_is_done_but_says_nothing_about_the_speed():
    clock = Clock()
    with RunProgress({"a": 100.0, "b": 10.0}, console=piped(), clock=clock) as progress:
        progress.skip("a")
        assert progress.share == pytest.approx(100 / 110)
        assert progress.seconds_left is None
        progress.start("b", 2)
        clock.now = 5.0
        progress.advance()
        assert progress.seconds_left == pytest.approx(5.0)


def test_recalled_steps_move_the_bar_but_say_nothing_about_the_speed():
    """32 blocks of 900 s, 20 of which an earlier run has made; to read one again takes 30 s."""
    clock = Clock()
    with RunProgress({"evaluate": 300.0, "blocks": 28_800.0}, console=piped(), clock=clock) as progress:
        clock.now = 5.0
        progress.skip("evaluate")
        progress.start("blocks", 32)
        for number in range(20):
            clock.now += 30.0
            progress.recall()
            assert progress.seconds_left is None
            assert progress.share == pytest.approx((300 + 900 * (number + 1)) / 29_100)
        for left in range(11, -1, -1):
            clock.now += 900.0
            progress.advance()
            assert progress.seconds_left == pytest.approx(900 * left)
        progress.finish()
    assert (progress.share, progress.seconds_left) == (1.0, 0.0)


def test_a_stage_that_was_recalled_in_part_earns_the_rest():
    clock = Clock()
    with RunProgress({"a": 40.0, "b": 30.0, "c": 50.0}, console=piped(), clock=clock) as progress:
        with progress.stage("a", 4):
            clock.now = 7.0
            progress.recall(3)
            clock.now = 27.0
            progress.advance()
        assert progress.seconds_left == pytest.approx(2 * 80)
        with progress.stage("b", 3):
            clock.now = 28.0
            progress.recall(3)
        assert progress.seconds_left == pytest.approx(2 * 50)
        assert progress.share == pytest.approx(70 / 120)


def test_a_run_of_which_all_is_there_ends_with_no_time_left():
    with RunProgress({"a": 0.1, "b": 0.7}, console=piped()) as progress:
        progress.skip("a")
        with progress.stage("b", 3):
            progress.recall()
            progress.recall(2)
            assert progress.seconds_left == 0
    assert (progress.share, progress.seconds_left) == (1.0, 0.0)
    with pytest.raises(ValueError, match="No stage 'c'"):
        progress.skip("c")


def test_bars_of_a_terminal_show_recalled_steps_and_the_time_of_the_others(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    clock = Clock()
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with RunProgress({"blocks": 1.0}, console=console, clock=clock) as progress:
        bars = progress._bars.progress
        progress.start("blocks", 32)
        clock.now = 600.0
        progress.recall(20)
        whole, stage = bars.tasks
        assert (stage.completed, stage.fields["left"], whole.fields["left"]) == (20 / 32, "-:--:--", "-:--:--")
        clock.now += 900.0
        progress.advance()
        assert (stage.completed, stage.fields["left"], whole.fields["left"]) == (21 / 32, "2:45:00", "2:45:00")


def test_plain_lines_are_few():
    console, clock = piped(), Clock()
    progress = RunProgress({"a": 1.0}, console=console, clock=clock, verbose=True)
    with progress, progress.stage("a", 10_000):
        for _ in range(10_000):
            clock.now += 0.001
            progress.advance()
    assert 45 <= len(lines(console)) <= 55
    assert lines(console)[-1].startswith("100% a 10000/10000")


def test_a_slow_stage_still_speaks_every_interval():
    console, clock = piped(), Clock()
    with RunProgress({"a": 1.0}, console=console, clock=clock, interval=10.0) as progress, progress.stage("a", 1e6):
        for _ in range(100):
            clock.now += 1.0
            progress.advance()
    assert len(lines(console)) == 10
    assert lines(console)[-1].startswith("  0% a 100/1e+06")


def test_nothing_is_told_about_progress_while_rows_are():
    console, clock = piped(), Clock()
    with RunProgress({"a": 1.0}, console=console, clock=clock) as progress, progress.stage("a", 30):
        for number in range(30):
            clock.now += 50.0
            progress.detail("linear", "only with verbose", time="1 s")
            progress.row(f"block {number:2d}", " 2.31 bits", "error 0.0412", time="50.0 s")
            progress.advance()
    assert len(lines(console)) == 30
    assert lines(console)[3] == "block  3       2.31 bits  error 0.0412    50.0 s"


@pytest.mark.parametrize("width", [12, 20, 40, 41, 48, 49, 120])
def test_rows_fit_every_console(width):
    console = piped(width)
    progress = RunProgress({"a": 1.0}, console=console)
    for label, time in (("block  3", "7.2 s"), ("block 12", "161.7 min")):
        progress.row(label, " 2.31 bits", "error 0.0412", time=time)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= max(width, 2 + len("error 0.0412"))
    words = " ".join(text.split())
    assert words == "block 3 2.31 bits error 0.0412 7.2 s block 12 2.31 bits error 0.0412 161.7 min"
    assert len(lines(console)) == 2 or width <= 41


def fail_after_one_step(progress):
    with progress.stage("a", 2):
        progress.advance()
        raise KeyError


def test_a_failed_stage_is_not_finished():
    with RunProgress({"a": 1.0}, console=piped()) as progress:
        with pytest.raises(KeyError):
            fail_after_one_step(progress)
        assert progress.share == pytest.approx(0.5)


def test_unknown_stage():
    with pytest.raises(ValueError, match="No stage 'c' among a, b"):
        RunProgress({"a": 1.0, "b": 1.0}, console=piped()).start("c", 1)


def test_other_ranks_are_silent():
    console = piped()
    with RunProgress({"a": 1.0}, console=console, enabled=False) as progress, progress.stage("a", 1):
        progress.say("no")
    assert lines(console) == []


@pytest.mark.parametrize("width", [40, 80, 200])
def test_lines_fit_the_console(width):
    console, clock = piped(width), Clock()
    with RunProgress({"block by block " * 9: 1.0}, console=console, clock=clock) as progress:
        progress.start("block by block " * 9, 30)
        for _ in range(30):
            clock.now += 100.0
            progress.advance(note="loss [0.1]")
    assert len(lines(console)) == 30
    assert max(map(len, lines(console))) <= width
    assert ("loss [0.1]" in console.file.getvalue()) == (width == 200)


@pytest.mark.parametrize("width", [40, 120])
def test_two_bars_on_a_terminal(width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, _environ={})
    with RunProgress({"calibration": 1.0, "blocks": 1.0}, console=console) as progress:
        with progress.stage("calibration", 2):
            progress.advance(note="[loss] 0.1")
        progress.say("between")
        assert "between" in console.file.getvalue()
    last = console.file.getvalue().rsplit("whole run", 1)[1]
    assert "50%" in last


def test_no_table_is_cut_at_any_width():
    header, row = list("abcdefgh"), [letter * 5 for letter in "stuvwxyz"]
    for width in range(40, 70):
        out = io.StringIO()
        print_table(header, [row], Console(file=out, width=width))
        assert all(cell in out.getvalue() for cell in row), width


def test_wide_and_narrow_tables():
    header, rows = ("stage", "bits", "a long [name]"), [["one", "2.0", "[x]"], ["two", "n/a", "y"]]
    wide, narrow = piped(60), piped(20)
    print_table(header, rows, wide, title="[title]")
    print_table(header, rows, narrow)
    assert [line.split() for line in lines(wide) if line.startswith("one")] == [["one", "2.0", "[x]"]]
    assert lines(wide)[0] == "[title]"
    assert lines(narrow)[:3] == ["one", "  bits           2.0", "  a long [name]  [x]"]


SCRIPT = """
from casp_pl.console import RunProgress, make_console, print_table, setup_logging
setup_logging()
console = make_console()
with RunProgress({"blocks": 1.0}, console=console, verbose=True) as progress, progress.stage("blocks", 3):
    progress.advance(note="caf\\u00e9")
    progress.say("question \\u4f60")
print_table(("stage", "VQA"), [["original", "90"]], console)
"""


def test_ascii_pipe_of_40_columns():
    settings = {**os.environ, "COLUMNS": "40", "LANG": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, env=settings, check=True)
    assert b"\x1b" not in done.stdout
    assert b"\r" not in done.stdout
    assert done.stderr == b""
    text = done.stdout.decode("ascii")
    assert max(len(line) for line in text.splitlines()) <= 40
    assert "100% blocks 3/3" in text


def test_piped_width(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert make_console(io.StringIO()).width == 120
    monkeypatch.setenv("COLUMNS", "50")
    assert make_console(io.StringIO()).width == 50
