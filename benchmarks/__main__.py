"""All benchmarks in one run: a Markdown file with the machine, the versions and the commit, and a picture beside it.

usage: python -m benchmarks [--out runs/bench] [--full] [--only kernels training_step ...]

Without `--full` every part is cut down to what shows the same in about a quarter of an hour on two cores. With it, it
is what the README quotes and takes hours, most of them in the baselines. Other tools are measured by `python -m
benchmarks.peers` in a `.venv-peers` of their own (`make peers`).
"""

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from casp_pl.callbacks.environment import package_versions, source_commit

PARTS: dict[str, tuple[list[str], list[str]]] = {
    "kernels": (["--shapes", "4096x4096", "576x576", "--repeats", "7"], []),
    "training_step": (["--repeats", "3"], []),
    "quantizers": (["--blocks", "15", "--tokens", "8192"], []),
    "aqlm": (["--blocks", "15", "--tokens", "8192"], []),
    "growth": (["--largest", "2048"], ["--largest", "8192"]),
    "gaussian": ([], []),
    "data_sources": (["--rows", "40"], []),
}
"""Name -> options of the short run and of the full one."""


def processor() -> str:
    """The CPU's name as Linux knows it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> int:
    """Run the parts one after the other; the exit code is that of the worst."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report, worst = options.out / "bench.md", 0
    head = [f"{key} {value}" for key, value in package_versions().items()]
    report.write_text(
        f"# Benchmarks\n\n{processor()}, {torch.get_num_threads()} threads, {platform.platform()}\n\n"
        f"commit {source_commit()}, {', '.join(head)}\n",
        encoding="utf-8",
    )
    for name in options.only:
        short, full = PARTS[name]
        command = [sys.executable, "-m", f"benchmarks.{name}", *(full if options.full else short)]
        if name == "growth":
            command += ["--picture", str(options.out / "growth.png")]
        print("$ " + " ".join(command[1:]), flush=True)
        start = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout, flush=True)
        worst = max(worst, abs(done.returncode))
        with report.open("a", encoding="utf-8") as file:
            file.write(
                f"\n## {name}\n\n`python {' '.join(command[1:])}`, {time.monotonic() - start:.0f} s\n\n{done.stdout}"
            )
            if name == "growth" and not done.returncode:
                file.write("\n![Seconds against size and tokens](growth.png)\n")
            if done.returncode:
                file.write(f"\nended with exit code {done.returncode}\n")
    print(f"written to {report}")
    return worst


if __name__ == "__main__":
    sys.exit(main())
