"""One fit by 1, 2 and 4 processes of one thread each: seconds of every stage, and whether the results are the same.

usage: python -m benchmarks.processes [--model tiny | embedded] [--blocks 4] [--processes 1 2] [--strategies ddp fsdp2]
                                      [--recipe configs/llava_aqlm.yaml] [--out runs/bench/processes]
                                      [--no-apart] [--set data.samples 64 ...]

The embedded model is cut to its first blocks and calibrated on as many samples as the recipe says; end-to-end
fine-tuning draws from these alone, and evaluation gets fewer. Processes talk by gloo. Codes, plan and losses are
compared with those of the first row: the largest difference of a loss (a relative error, or nats), and the largest
relative to the loss. More processes than cores say nothing about time. Cores share caches, memory and power, so the
last line tells what two fits that have nothing to do with each other cost when they run at once: no two processes can
be faster together than that. A fit of the tiny model comes before, so that nothing is compiled later.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from casp_pl.models import adapt, load_model

STAGES = ("calibration", "quantize", "block tuning", "end to end")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
FEW = ["--data.fine_tuning_samples", "null"]
NO_TUNING = ["--block_tuning.epochs", "0", "--end_to_end.steps", "0"]
TINY = ["--config", "configs/models/tiny.yaml"]
FEW += ["--evaluation.questions", "24", "--evaluation.text_tokens", "768"]


def first_blocks(blocks: int, folder: Path) -> Path:
    """The embedded model with its first blocks alone, as a Hugging Face directory."""
    model, processor = load_model("embedded")
    decoder = adapt(model).decoder
    decoder.layers = decoder.layers[:blocks]
    decoder.config.num_hidden_layers = model.config.text_config.num_hidden_layers = blocks
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def fit(arguments: list[str], folder: Path, processes: int = 1, strategy: str = "auto") -> Path:
    """Run one fit from the beginning; its directory."""
    fit_at_once(arguments, [folder], processes, strategy)
    return folder


def fit_at_once(arguments: list[str], folders: list[Path], processes: int = 1, strategy: str = "auto") -> None:
    """Run a fit from the beginning in every directory, all at the same time."""
    running = []
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "casp_pl", "fit", *arguments, "--run_dir", str(folder)]
        command += ["--trainer.devices", str(processes), "--trainer.strategy", strategy]
        with folder.with_suffix(".log").open("w", encoding="utf-8") as log:
            running.append(subprocess.Popen(command, env=os.environ | ONE_THREAD, stdout=log, stderr=log))
    for folder, process in zip(folders, running, strict=True):
        if process.wait():
            raise SystemExit(f"a fit ended with {process.returncode}, see {folder.with_suffix('.log')}")


def work_seconds(run: Path) -> dict[str, float]:
    """Of every stage."""
    seconds: dict[str, float] = json.loads((run / "report.json").read_text())["work_seconds"]
    return seconds


def same_codes(one: Path, other: Path) -> tuple[int, int]:
    """Equal codes after quantization, and all."""
    same = total = 0
    for path in sorted(one.glob("blocks/*.safetensors")):
        theirs = load_file(other / path.relative_to(one))
        for name, tensor in load_file(path).items():
            if name.endswith("codes"):
                same, total = same + int((tensor == theirs[name]).sum()), total + tensor.numel()
    return same, total


def worst_loss(one: Path, other: Path) -> tuple[float, float]:
    """Largest difference of a loss of training or validation, and largest relative one."""
    mine, theirs = (EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}) for run in (one, other))
    mine.Reload(), theirs.Reload()
    absolute = relative = 0.0
    for tag in mine.Tags()["scalars"]:
        if tag.startswith(("block_tuning", "end_to_end")):
            for a, b in zip(mine.Scalars(tag), theirs.Scalars(tag), strict=True):
                difference = abs(a.value - b.value)
                absolute, relative = max(absolute, difference), max(relative, difference / abs(a.value))
    return absolute, relative


def limit(apart: list[Path], alone: Path) -> str:
    """What two fits that run at once and share nothing get done in the time of one that runs alone."""
    most = []
    for stage in STAGES[:2]:
        slowest = max(work_seconds(run)[stage] for run in apart)
        most.append(f"{stage} {len(apart) * work_seconds(alone)[stage] / slowest:.2f}")
    return f"\nTwo fits at once that share nothing, times as much work as one alone: {', '.join(most)}."


def row(name: str, run: Path, first: Path) -> str:
    """One line of the table."""
    ours, theirs = work_seconds(run), work_seconds(first)
    times = " | ".join(f"{ours[stage]:.1f}" for stage in STAGES)
    plans = [(path / "plan.json").read_bytes() for path in (run, first)]
    same, total = same_codes(first, run)
    ratio = theirs["quantize"] / ours["quantize"]
    absolute, relative = worst_loss(first, run)
    equal = f"{plans[0] == plans[1]} | {100 * same / total:.3f} % | {absolute:.1e} | {relative:.1e}"
    return f"| {name} | {times} | {ratio:.2f} | {equal} |"


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "embedded"), default="embedded")
    parser.add_argument("--blocks", type=int, default=4, help="of the embedded model")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--strategies", nargs="+", default=["ddp"])
    parser.add_argument("--no-apart", dest="apart", action="store_false", help="leave the last line out")
    parser.add_argument("--recipe", default="configs/llava_aqlm.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/processes"))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY VALUE", help="further settings of the recipe")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    recipe = ["--config", options.recipe, "--trainer.precision", "32-true"]
    arguments = list(recipe)
    if options.model == "tiny":
        arguments += TINY
    else:
        arguments += ["--model.source", str(first_blocks(options.blocks, options.out / "model")), *FEW]
    pairs = zip(options.set[::2], options.set[1::2], strict=True)
    arguments += [item for key, value in pairs for item in (f"--{key}", value)]
    fit([*recipe, *TINY], options.out / "tiny")
    columns = ["processes", *(f"{stage} s" for stage in STAGES), "quantize, times as fast"]
    columns += ["plan", "codes", "loss", "loss, relative"]
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns), flush=True)
    first = None
    for count in options.processes:
        for strategy in options.strategies if count > 1 else ["auto"]:
            run = fit(arguments, options.out / f"{strategy}-{count}", count, strategy)
            first = run if first is None else first
            print(row(f"{count} {strategy}" if count > 1 else "1", run, first), flush=True)
    if first is not None and options.apart:
        apart = [options.out / f"apart-{number}" for number in range(2)]
        fit_at_once([*arguments, *NO_TUNING], apart)
        print(limit(apart, first))


if __name__ == "__main__":
    main()
