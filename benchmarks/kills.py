"""SIGKILL at random moments of a tiny run, again and again: every result has to be that of an undisturbed run.

usage: python -m benchmarks.kills [--kills 200] [--processes 1] [--out runs/kills] [--seed 0]

The model is the tiny LLaVA with four blocks. Two runs are left alone. Then a run is started, killed at a random moment
after it has locked its directory, started again, killed again ... until it ends; then the next one begins, until there
have been so many kills. Every finished run is compared with the first undisturbed one, tensor by tensor, bit by bit;
nothing half-written may lie there, and `verify` has to find it whole.

With `--processes 2` one random rank (DDP on gloo) is killed each time. The others have to end by themselves within a
minute, with an exit code that is not 0.

Every process is forked from this one, which has imported everything: a kill costs no start. It can be interrupted at
any time; the same command goes on with the next kill.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from casp_pl.checkpoint import verify, write_json
from casp_pl.cli import main as casp_pl_main
from casp_pl.models.tiny import load_tiny

ROOT = Path(__file__).parents[1]
BLOCKS = 4
PATIENCE = 60.0  # seconds that the other ranks have, once one is dead
LOCKED = 600.0  # seconds that a run has to lock its directory; it reads the tiny model before
LONGEST = 1800.0  # seconds of one run, undisturbed and on a busy machine
STAGES = ("original", "rtn", "calibration", "quantize", "block tuning", "end to end", "save", "report", "finished")


@dataclass
class Kill:
    """One SIGKILL: in which run, how many seconds after it had its lock, in which stage, which rank, what it left."""

    run: int
    seconds: float
    stage: str
    rank: int
    leftovers: int
    others_ended_after: float = 0.0


@dataclass
class Record:
    """Everything so far; kept in kills.json after every event.

    Attributes:
        undisturbed: seconds of a run that was left alone, from its lock on.
        kills: in order.
        finished: run -> what is wrong with its result; empty lists are what we want.
        starts: how often a run was started, the undisturbed one not counted.
        hung: kills after which another rank did not end by itself.
        silent: ranks that ended with exit code 0 in a run that was not finished.
    """

    undisturbed: float = 0.0
    kills: list[Kill] = field(default_factory=list)
    finished: dict[str, list[str]] = field(default_factory=dict)
    starts: int = 0
    hung: int = 0
    silent: int = 0

    @classmethod
    def load(cls, path: Path) -> "Record":
        """What an earlier call has written, or nothing."""
        if not path.exists():
            return cls()
        values: dict[str, Any] = json.loads(path.read_text())
        return cls(**(values | {"kills": [Kill(**kill) for kill in values["kills"]]}))


class Run:
    """The processes of one `fit`, one a rank."""

    def __init__(self, out: Path, name: str, processes: int) -> None:
        self.folder = out / name
        self.out = out
        self.ends: dict[int, int] = {}  # process id -> exit code
        port = _free_port()
        self.ranks = [self._fork(rank, processes, port) for rank in range(processes)]

    def _fork(self, rank: int, processes: int, port: int) -> int:
        child = os.fork()
        if child:
            return child
        log = os.open(self.out / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        os.environ |= together if processes > 1 else {}
        code = 1
        try:
            code = _fit(self.out, self.folder, processes)
        finally:  # whatever happens, this process is not to go on as its parent does
            sys.stdout.flush()
            os._exit(code)

    def has_started(self) -> bool:
        """Whether the first process holds the lock of the run's directory."""
        lock = self.folder / ".lock"
        return lock.exists() and lock.read_text().strip() == str(self.ranks[0])

    def running(self) -> list[int]:
        """Ranks that have not ended."""
        for process in set(self.ranks) - self.ends.keys():
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                self.ends[process] = os.waitstatus_to_exitcode(status)
        return [rank for rank, process in enumerate(self.ranks) if process not in self.ends]

    def wait(self, seconds: float) -> bool:
        """Wait until no rank is left; False if that takes longer than so many seconds."""
        deadline = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def wait_for_lock(self) -> bool:
        """Wait until the run has begun; False if it ended before that, and the end of everything if it hangs."""
        deadline = time.monotonic() + LOCKED
        while not self.has_started():
            if not self.running():
                return False
            if time.monotonic() > deadline:
                hanging = self.running()
                for rank in hanging:
                    self.kill(rank)
                self.wait(PATIENCE)
                raise SystemExit(
                    f"{self.folder} was not locked within {LOCKED:g} s: ranks {hanging} hung and were killed;"
                    f" see {self.out / 'output.txt'}"
                )
            time.sleep(0.002)
        return True

    def kill(self, rank: int) -> None:
        """SIGKILL."""
        os.kill(self.ranks[rank], signal.SIGKILL)

    def codes(self) -> list[int]:
        """Exit codes by rank; negative for a signal."""
        return [self.ends[process] for process in self.ranks]


def _fit(out: Path, folder: Path, processes: int) -> int:
    """The exit code of `casp_pl fit` in this process."""
    torch.set_num_threads(1)
    configs = [ROOT / "configs/llava_aqlm.yaml", ROOT / "configs/models/tiny.yaml"]
    arguments = ["fit", *(word for path in configs for word in ("--config", str(path)))]
    arguments += ["--model.source", str(out / "model"), "--block_tuning.window", "2", "--run_dir", str(folder)]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.devices", str(processes), "--trainer.precision", "32-true"]
    return casp_pl_main(arguments)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def stage_of(folder: Path) -> str:
    """The stage that a run would go on with, by its manifest."""
    path = folder / "manifest.json"
    names = set(json.loads(path.read_text())["artifacts"]) if path.exists() else set()

    def blocks(kind: str) -> bool:
        return all(f"{kind}/{number:03d}.safetensors" in names for number in range(BLOCKS))

    done = {
        "original": "stages/original.json" in names,
        "rtn": "stages/rtn.json" in names,
        "calibration": "plan.json" in names,
        "quantize": blocks("blocks") and "stages/quantized.json" in names,
        "block tuning": blocks("tuned") and "stages/block_tuned.json" in names,
        "end to end": blocks("end_to_end") and "stages/end_to_end.json" in names,
        "save": "model/manifest.json" in names,
        "report": "examples.png" in names,  # the last of its pictures; its text is written after every stage
    }
    return next((stage for stage, is_done in done.items() if not is_done), "finished")


def leftovers(folder: Path) -> list[str]:
    """What a killed write leaves."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".tmp*")) if folder.exists() else []


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor of every file, and of the plan; notes beside tensors hold wall times, which differ."""
    found = {"plan.json": hashlib.sha256((folder / "plan.json").read_bytes()).hexdigest()}
    for path in sorted(folder.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            shape = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
            found[f"{path.relative_to(folder)}:{name}"] = hashlib.sha256(shape + raw).hexdigest()
    return found


def wrong_with(folder: Path, expected: dict[str, str]) -> list[str]:
    """How a finished run differs from the undisturbed one."""
    mine = digests(folder)
    problems = [name for name in sorted(mine.keys() | expected.keys()) if mine.get(name) != expected.get(name)]
    return problems + [f"left behind: {name}" for name in leftovers(folder)] + verify(folder)


def _undisturbed_seconds(out: Path, name: str, processes: int) -> float:
    run = Run(out, name, processes)
    if not run.wait_for_lock():
        raise SystemExit(f"the undisturbed run ended with {run.codes()}: see {out / 'output.txt'}")
    start = time.monotonic()
    if not run.wait(LONGEST) or any(run.codes()):
        raise SystemExit(f"the undisturbed run failed: {run.ends}; see {out / 'output.txt'}")
    return time.monotonic() - start


def undisturbed(out: Path, processes: int, record: Record) -> dict[str, str]:
    """Make the runs that are left alone, unless they are there; the digests of the tensors of the first."""
    if not (out / "model/config.json").exists():
        model, processor = load_tiny(blocks=BLOCKS)
        model.save_pretrained(out / "model")
        processor.save_pretrained(out / "model")
    if not record.undisturbed:
        seconds = [_undisturbed_seconds(out, name, processes) for name in ("undisturbed", "undisturbed again")]
        record.undisturbed = seconds[-1]  # the first one compiles kernels, which no later one does
        print(f"undisturbed runs took {seconds[0]:.1f} and {seconds[1]:.1f} s", flush=True)
    return digests(out / "undisturbed")


def next_kill(out: Path, number: int, processes: int, record: Record, draw: random.Random) -> Kill | None:
    """Start run `number` once and kill it at a random moment; None if it ended before."""
    spent = sum(kill.seconds for kill in record.kills if kill.run == number)
    rest = max(record.undisturbed - spent, record.undisturbed / 5)  # so that a run is killed several times, all over it
    delay, victim = draw.uniform(0, rest), draw.randrange(processes)
    run = Run(out, f"{number:03d}", processes)
    record.starts += 1
    # a report is written anew, which may take longer than any delay that is drawn, and so may the end of a finished run
    over = any(kill.run == number and kill.stage in ("report", "finished") for kill in record.kills)
    if run.wait_for_lock() and not run.wait(LONGEST if over else delay):
        run.kill(victim)
        killed = time.monotonic()
        stage = stage_of(run.folder)
        if not run.wait(PATIENCE):
            record.hung += 1
            for rank in run.running():
                run.kill(rank)
            run.wait(PATIENCE)
        others = [code for rank, code in enumerate(run.codes()) if rank != victim]
        if stage_of(run.folder) != "finished":  # at the very end another rank may have done all it had to do
            record.silent += sum(code == 0 for code in others)
        if run.codes()[victim] == -signal.SIGKILL:
            ended = time.monotonic() - killed if processes > 1 else 0.0
            return Kill(number, delay, stage, victim, len(leftovers(run.folder)), ended)
    if any(run.codes()):
        raise SystemExit(f"run {number} ended by itself with {run.codes()}: see {out / 'output.txt'}")
    return None


def summary(record: Record, processes: int) -> str:
    """Kills by stage, and what became of the runs, as Markdown."""
    by_stage = Counter(kill.stage for kill in record.kills)
    left = Counter(kill.stage for kill in record.kills if kill.leftovers)
    lines = ["| stage | kills | that left a half-written file |", "| --- | ---: | ---: |"]
    lines += [f"| {stage} | {by_stage[stage]} | {left[stage]} |" for stage in STAGES if by_stage[stage]]
    lines.append(f"| all | {len(record.kills)} | {left.total()} |")
    wrong = {run: problems for run, problems in record.finished.items() if problems}
    different = sum(not problem.startswith("left behind") for problems in wrong.values() for problem in problems)
    behind = sum(problem.startswith("left behind") for problems in wrong.values() for problem in problems)
    lines += [
        "",
        f"{processes} processes a run, {record.undisturbed:.1f} s undisturbed; {record.starts} starts, "
        f"{len(record.finished)} runs finished.",
        f"Runs that differ from the undisturbed one: {len(wrong)}"
        f" ({different} tensors or files, {behind} files left behind).",
    ]
    if processes > 1 and record.kills:
        times = sorted(kill.others_ended_after for kill in record.kills)
        lines.append(
            f"The others ended after {statistics.median(times):.2f} s (median), {times[-1]:.2f} s at most; "
            f"{record.hung} hung, {record.silent} ended with exit code 0."
        )
    return "\n".join([*lines, *(f"{run}: {', '.join(problems[:3])}" for run, problems in wrong.items())])


def main() -> int:
    """Print progress and a table; the exit code is 1 if any result differs or any rank hung."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="default runs/kills_PROCESSES")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out = (options.out or Path(f"runs/kills_{options.processes}")).absolute()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "kills.json"
    record = Record.load(path)
    expected = undisturbed(out, options.processes, record)
    write_json(path, asdict(record))
    while True:
        number = len(record.finished)
        draw = random.Random(f"{options.seed} {record.starts}")
        if len(record.kills) < options.kills:
            kill = next_kill(out, number, options.processes, record, draw)
        elif not (out / f"{number:03d}").exists():
            break
        else:  # the last run is left to end
            run = Run(out, f"{number:03d}", options.processes)
            record.starts += 1
            if not run.wait(LONGEST) or any(run.codes()):
                raise SystemExit(f"run {number} failed: {run.ends}; see {out / 'output.txt'}")
            kill = None
        if kill is not None:
            record.kills.append(kill)
            print(
                f"kill {len(record.kills)}/{options.kills}: run {number}, rank {kill.rank}, {kill.seconds:.2f} s after"
                f" its lock, in {kill.stage}, {kill.leftovers} left half-written",
                flush=True,
            )
        else:
            record.finished[f"{number:03d}"] = wrong_with(out / f"{number:03d}", expected)
            print(f"run {number} finished: {len(record.finished[f'{number:03d}'])} differences", flush=True)
        write_json(path, asdict(record))
    print(summary(record, options.processes))
    return int(any(record.finished.values()) or record.hung > 0 or record.silent > 0)


if __name__ == "__main__":
    sys.exit(main())
