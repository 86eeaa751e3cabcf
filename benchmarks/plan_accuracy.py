"""How well `plan` foresees a fit: time, memory and size, beside what the fit then takes.

usage: python -m benchmarks.plan_accuracy [--config RECIPE ...] [--run_dir DIR] [--finished DIR]

Runs `plan`, then the fit in a process of its own whose memory is looked at five times a second, then `plan` once more:
ranks and bits are known then, and so is the size. With --finished nothing is fitted, and only the largest memory of the
run is known. Stages are told apart by the times of the files that they leave. Goals: time within 30 %, memory within
15 %, the size to the byte.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

DEFAULT_RECIPE = "configs/llava_aqlm.yaml"
SAMPLING_SECONDS = 0.2
SETTLING_SECONDS = 5.0  # a stage ends with its last file; what it held is given back only then


def forecast(recipe: Sequence[str], run_dir: Path) -> tuple[dict[str, Any], float]:
    """What `plan --json` says, and the seconds that it took."""
    command = [sys.executable, "-m", "casp_pl", "plan", *recipe, "--run_dir", str(run_dir), "--json"]
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout), time.monotonic() - start


def watched_fit(recipe: Sequence[str], run_dir: Path) -> list[tuple[float, int]]:
    """Run the fit; wall clock and resident bytes of its process, again and again."""
    process = subprocess.Popen(
        [sys.executable, "-m", "casp_pl", "fit", *recipe, "--run_dir", str(run_dir)], stdout=subprocess.DEVNULL
    )
    samples = []
    while process.poll() is None:
        try:
            samples.append((time.time(), psutil.Process(process.pid).memory_info().rss))
        except psutil.NoSuchProcess:
            break
        time.sleep(SAMPLING_SECONDS)
    if process.wait() != 0:
        raise SystemExit(f"the fit ended with exit code {process.returncode}")
    return samples


def stage_ends(run_dir: Path) -> dict[str, float]:
    """Stage -> wall clock of its end, in order; `start` is the first."""
    files = {
        "start": "config.yaml",
        "evaluate original": "stages/original.json",
        "evaluate rtn": "stages/rtn.json",
        "calibration": "plan.json",
        "quantize": "blocks/*.safetensors",
        "evaluate quantized": "stages/quantized.json",
        "block tuning": "tuned/*.safetensors",
        "evaluate block_tuned": "stages/block_tuned.json",
        "end to end": "end_to_end/*.safetensors",
        "evaluate end_to_end": "stages/end_to_end.json",
        "save": "report.json",
    }
    found = {stage: [path.stat().st_mtime for path in run_dir.glob(pattern)] for stage, pattern in files.items()}
    return {stage: max(times) for stage, times in found.items() if times}


def weights_on_disk(run_dir: Path) -> int:
    """Bytes of the compressed model's safetensors files, what `plan` calls weights."""
    return sum(path.stat().st_size for path in (run_dir / "model").glob("*.safetensors"))


def off(predicted: float, measured: float) -> str:
    """By how much the forecast is off, in percent."""
    return f"{100 * (predicted / measured - 1):+.0f} %" if measured > 0 else "n/a"


def print_stages(before: dict[str, Any], run_dir: Path, samples: Sequence[tuple[float, int]]) -> None:
    """The table of the stages."""
    ends = stage_ends(run_dir)
    names = list(ends)
    print("| stage | time predicted | interval | measured | off | within | memory predicted, GB | measured | off |")
    print("| --- " + "| ---: " * 8 + "|")
    planned = {stage["name"]: stage for stage in before["stages"]}
    total = 0.0
    for earlier, name in zip(names, names[1:], strict=False):
        seconds = ends[name] - ends[earlier]
        total += seconds
        stage = planned[name]
        begun = ends[earlier] + min(SETTLING_SECONDS, seconds / 4) * name.startswith("evaluate")
        inside = "yes" if stage["seconds_low"] <= seconds <= stage["seconds_high"] else "NO"
        held = [resident for clock, resident in samples if begun <= clock <= ends[name]]
        memory = f"{max(held) / 1e9:.2f} | {off(stage['memory_bytes'], max(held))}" if held else "n/a | n/a"
        print(
            f"| {name} | {stage['seconds']:.1f} s | {stage['seconds_low']:.0f} - {stage['seconds_high']:.0f} |"
            f" {seconds:.1f} s | {off(stage['seconds'], seconds)} |"
            f" {inside} | {stage['memory_bytes'] / 1e9:.2f} | {memory} |"
        )
    peak = json.loads((run_dir / "report.json").read_text())["peak_memory_bytes"]
    print(
        f"| all | {before['seconds']:.1f} s | | {total:.1f} s | {off(before['seconds'], total)} | |"
        f" {before['memory_bytes'] / 1e9:.2f} | {peak / 1e9:.2f} | {off(before['memory_bytes'], peak)} |"
    )


def print_sizes(before: dict[str, Any], after: dict[str, Any], run_dir: Path) -> None:
    """The table of the final size."""
    truth = weights_on_disk(run_dir)
    others = {"README.md", "manifest.json"}
    files = [path for path in (run_dir / "model").rglob("*") if path.is_file() and path.name not in others]
    files = [path for path in files if path.suffix != ".safetensors"]
    beside = sum(path.stat().st_size for path in files)
    print("\n| size, bytes | before calibration | after it | on disk |\n| --- | ---: | ---: | ---: |")
    cells = [f"{told['size']['weights']:,} ({told['size']['weights'] - truth:+,})" for told in (before, after)]
    print(f"| weights | {' | '.join(cells)} | {truth:,} |")
    print(f"| config and processor | {before['size']['beside']:,} | {after['size']['beside']:,} | {beside:,} |")
    print(f"\nbefore calibration: {before['size_note'] or 'exact'}; after it: {after['size_note'] or 'exact'}")


def main() -> None:
    """Print two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", help=f"a recipe or overlay; default {DEFAULT_RECIPE}")
    parser.add_argument("--run_dir", type=Path, help="where the fit is written; default: thrown away")
    parser.add_argument("--finished", type=Path, help="a finished run of this recipe to compare with")
    options = parser.parse_args()
    recipe = [part for path in options.config or [DEFAULT_RECIPE] for part in ("--config", path)]
    with tempfile.TemporaryDirectory() as folder:
        run_dir = options.finished or options.run_dir or Path(folder) / "run"
        before, seconds = forecast(recipe, Path(folder) / "not_yet")
        print(f"plan took {seconds:.0f} s; times from {before['seconds_from']}\n")
        samples = [] if options.finished else watched_fit(recipe, run_dir)
        print_stages(before, run_dir, samples)
        after, _ = forecast([*recipe, "--quick"], run_dir)
        print_sizes(before, after, run_dir)


if __name__ == "__main__":
    main()
