"""All benchmarks in one run: a Markdown file with the machine, the versions and the commit, and a picture beside it.

usage: python -m benchmarks [--out runs/bench] [--full] [--only kernels training_step ...]

Without `--full` every part is cut down to what shows the same in about half an hour on two cores. With it, it is what
the README quotes and takes hours, most of them in the baselines, and the whole model is quantized as well, by ours and,
in a `.venv-peers` of their own (`make peers`, `make llama-cpp`; what is not there is left out), by other tools.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from casp_pl.callbacks.environment import package_versions, source_commit

PARTS: dict[str, tuple[list[str] | None, list[str]]] = {
    "kernels": (["--shapes", "4096x4096", "576x576", "--repeats", "7"], []),
    "correctness": (["--shapes", "131x75"], []),
    "training_step": (["--repeats", "5"], ["--repeats", "9"]),
    "block_step": ([], ["--repeats", "9"]),
    "quantizers": (["--blocks", "15", "--tokens", "8192"], []),
    "aqlm": (["--blocks", "15", "--tokens", "8192"], []),
    "aqlm random": (None, ["--random", "4096x4096", "11008x4096", "--rounds", "1", "--repeats", "1"]),
    "shares": ([], ["--blocks", "0", "15", "29", "--tokens", "32768"]),
    "shares random": (None, ["--random", "4096x4096"]),
    "whole_model": (None, ["--methods", "gptq", "quip", "aqlm_2x8"]),
    "peers gptqmodel": (None, []),
    "peers auto-round": (None, []),
    "peers hqq": (None, []),
    "llama_cpp": (None, []),
    "growth": (["--largest", "2048", "--tokens", "16384"], ["--largest", "8192", "--tokens", "65536"]),
    "gaussian": ([], []),
    "data_sources": (["--rows", "40"], []),
}
"""Module, perhaps with a first argument -> options of the short run, None where it is left out, and of the full one."""
PEERS_PYTHON = Path(".venv-peers/bin/python").absolute()
OF_PEERS = {"peers": "gptqmodel", "llama_cpp": "llama_cpp"}
"""Modules that run in the environment of other tools -> a package that they need there."""


def processor() -> str:
    """The CPU's name as Linux knows it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def lacks_peer(name: str) -> bool:
    """Whether a part needs a tool that is not installed."""
    package = OF_PEERS.get(name.split()[0])
    if package is None:
        return False
    search = f"import importlib.util as u, sys; sys.exit(u.find_spec('{package}') is None)"
    return not PEERS_PYTHON.exists() or subprocess.run([PEERS_PYTHON, "-c", search], check=False).returncode != 0


def command_of(name: str, options: list[str], out: Path) -> list[str]:
    """The command of a part; those of other tools run in the environment of these."""
    module, *first = name.split()
    first = [] if first == ["random"] else first
    places = {"growth": ["--picture", str(out / "growth.png")], "whole_model": ["--out", str(out / "whole_model")]}
    python = str(PEERS_PYTHON) if module in OF_PEERS else sys.executable
    return [python, "-m", f"benchmarks.{module}", *first, *options, *places.get(name, [])]


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
        f"# Benchmarks\n\n{processor()}, {os.cpu_count()} cores, {platform.platform()}\n\n"
        f"commit {source_commit()}, {', '.join(head)}\n",
        encoding="utf-8",
    )
    for name in options.only:
        short, full = PARTS[name]
        wanted = full if options.full else short
        if wanted is None or lacks_peer(name):
            print(f"{name}: left out\n", flush=True)
            continue
        command = command_of(name, wanted, options.out)
        print("$ python " + " ".join(command[1:]), flush=True)
        start = time.monotonic()
        path = os.pathsep.join([str(Path(command[0]).parent), os.environ.get("PATH", "")])
        environment = os.environ | {"PATH": path}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
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
