"""Whole-model figures without fine-tuning: every quantizer, with and without CASP's steps and error propagation.

usage: python -m benchmarks.whole_model [--out runs/whole_model] [--samples 128] [--methods gptq quip aqlm aqlm_2x8]

Every row is a `casp_pl fit` of SmolLM2-135M on text with the same calibration, of 32,768 tokens unless `--samples` says
otherwise, and the same held-out text. Runs lie in a folder of the commit that makes them, under `--out`: a row that
this commit has finished is not computed again, and one of a changed working tree always is. The rows with CASP
(low-rank W_q and W_k, bits by block) may spend, everything counted, what the plain row of their quantizer spends.
Seconds are wall time by stage: of the calibration pass, of the quantization of all blocks with its activations and
second moments, the quantizers' share of that, and of the evaluation. What the fits say goes to standard error.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.output import stdout_as_stderr
from casp_pl.callbacks.environment import source_commit
from casp_pl.callbacks.report_markdown import markdown_table
from casp_pl.cli import main as casp_pl

CONFIGS = Path(__file__).parents[1] / "configs"
PLAIN = ["--low_rank.mode", "off", "--bits.score", "uniform"]
METHODS: dict[str, tuple[str, str, list[str]]] = {  # name -> (heading, config, what differs from it)
    "gptq": ("GPTQ g64 act-order", "llama_gptq.yaml", []),
    "quip": ("QuIP# E8P", "llama_quip.yaml", []),
    "aqlm": ("AQLM", "llama_aqlm.yaml", []),
    "aqlm_2x8": ("AQLM 2x8", "llama_aqlm.yaml", ["--quantizer.init_args.formats", "{2: [[2, 256, 8]]}"]),
}
HEADER = [
    "quantizer", "CASP", "propagation", "bits in all", "perplexity", "KL", "calibrate s", "quantize s",
    "of it quantizers s", "evaluate s",
]  # fmt: skip


def fit(folder: Path, method: str, samples: int, *overrides: str) -> dict[str, Any]:
    """Stage name -> its figures, of one run without fine-tuning."""
    _, config, differs = METHODS[method]
    command = ["fit", "--config", str(CONFIGS / config), "--run_dir", str(folder), *differs]
    command += ["--block_tuning.epochs", "0", "--end_to_end.steps", "0", "--data.samples", str(samples)]
    command += ["--data.holdout", "0.0", *overrides]  # nothing is tuned, so nothing has to be held back
    with stdout_as_stderr():
        code = casp_pl(command)
    if code != 0:
        raise SystemExit(f"{folder}: the run failed")
    report = json.loads((folder / "report.json").read_text())
    work = {**report["work_seconds"], "quantizers": sum(module["seconds"] for module in report["modules"])}
    return {stage["name"]: {**stage, "work": work} for stage in report["stages"]}


def commit_folder(out: Path) -> Path:
    """Where the runs of this source lie; of a tree that differs from its commit, or of none, a new folder each time."""
    commit = source_commit()
    if commit is None or commit.endswith("-dirty"):
        return out / f"{commit or 'unknown'}-{time.strftime('%Y%m%d-%H%M%S')}"
    return out / commit


def row(name: str, casp: str, propagation: str, stage: dict[str, Any]) -> list[str]:
    """One line of the table."""
    kl = "" if stage["kl"] is None else f"{stage['kl']:.3f}"
    bits = f"{stage['bits_per_weight_total']:.3f}"
    work = dict(stage["work"]) if stage["name"] == "quantized" else {}
    if stage["name"] != "rtn" and stage["seconds"] is not None:  # RTN's are not told apart from its evaluation's
        work["evaluate"] = stage["seconds"] - work.get("quantize", 0.0)
    parts = ("calibration", "quantize", "quantizers", "evaluate")
    seconds = [f"{work[part]:.0f}" if part in work else "" for part in parts]
    return [name, casp, propagation, bits, f"{stage['perplexity']:,.2f}", kl, *seconds]


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/whole_model"))
    parser.add_argument("--samples", type=int, default=128, help="windows of 256 tokens to calibrate on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--plain", action="store_true", help="leave CASP's steps and propagation out")
    options = parser.parse_args()
    rows: list[list[str]] = []
    out = commit_folder(options.out)
    print(f"Runs of {out.name}\n", flush=True)
    for method in options.methods:
        for propagation in ("0.0",) if options.plain else ("0.0", "0.5"):
            aim = ["--quantization.propagation", propagation]
            plain = fit(out / f"{method}_{propagation}", method, options.samples, *PLAIN, *aim)
            if not rows:
                rows += [row("original", "", "", plain["original"]), row("RTN g64", "no", "no", plain["rtn"])]
            on = "no" if propagation == "0.0" else "yes"
            rows.append(row(METHODS[method][0], "no", on, plain["quantized"]))
            if options.plain:
                continue
            budget = str(plain["quantized"]["bits_per_weight_total"])
            casp = fit(
                out / f"{method}_{propagation}_casp", method, options.samples, *aim,
                "--bits.counts", "total", "--bits.budget", budget, "--baseline", "null",
            )  # fmt: skip
            rows.append(row(METHODS[method][0], "yes", on, casp["quantized"]))
    print(markdown_table(HEADER, rows))


if __name__ == "__main__":
    main()
