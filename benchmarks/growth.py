"""How cost grows: CPU seconds of quantization against the size of a square matrix, and of calibration against tokens.

usage: python -m benchmarks.growth [--largest 4096] [--tokens 32768] [--threads 1] [--picture docs/pictures/growth.png]

Exponents are slopes of least squares in logarithms over the four largest sizes: below, fixed costs show. Matrices of up
to 1024 rows are quantized five times and the median counts; larger ones and calibration once. Every run factorises its
second moment anew. Calibration is the pass of a fit (`CalibrationModule`) over SmolLM2-135M, on batches of eight
windows of 256 tokens that are loaded beforehand; where the text is too short for as many tokens as are wanted, its
batches come again.
"""

import argparse
import math
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

from benchmarks.aqlm import random_case
from benchmarks.clock import timed
from benchmarks.cold import cold_median
from casp_pl.data.calibration import CalibrationData
from casp_pl.models import adapt
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.demo.language import load_language_model, load_tokenizer
from casp_pl.modules.calibration import CalibrationModule
from casp_pl.pipeline.trainers import TrainerFactory
from casp_pl.quantizers import AQLMQuantizer, GPTQQuantizer, Quantizer, QuIPSharpQuantizer

QUANTIZERS: dict[str, Quantizer] = {
    "GPTQ g64 act-order": GPTQQuantizer(group_size=64, order="activation"),
    "QuIP# E8P": QuIPSharpQuantizer(),
    "AQLM 2x8": AQLMQuantizer(formats={2: [[2, 256, 8]]}),
}
WINDOWS, WINDOW, BATCH = 128, 256, 8
FEWEST_TOKENS = 2048  # one batch

Costs = dict[int, float]


def exponent(costs: Costs) -> float:
    """Slope of log cost over log size, of the four largest sizes."""
    points = [(math.log(size), math.log(cost)) for size, cost in sorted(costs.items())[-4:]]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope: float = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return slope


def draw(quantizers: dict[str, Costs], calibration: Costs, path: Path) -> None:
    """Both families of curves beside each other in logarithmic axes."""
    mpl.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, (sizes, tokens) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    curves = [(sizes, name, costs) for name, costs in quantizers.items()] + [(tokens, "calibration", calibration)]
    for axis, name, costs in curves:
        axis.loglog(list(costs), list(costs.values()), "o-", label=f"{name}: exponent {exponent(costs):.2f}")
    for axis, label in ((sizes, "rows and columns of the matrix"), (tokens, "calibration tokens")):
        axis.set(xlabel=label, ylabel="CPU seconds")
        axis.set_xticks(axis.lines[0].get_xdata())  # what was measured
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_formatter(StrMethodFormatter("{x:g}"))
            ticks.set_minor_formatter(NullFormatter())
        axis.grid(visible=True, which="both", alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def doubling(first: int, last: int) -> list[int]:
    """`first` and its doubles up to `last`."""
    return [first << step for step in range((last // first).bit_length())]


def quantization_costs(largest: int, heading: str) -> dict[str, Costs]:
    """CPU seconds of every quantizer by rows of a square matrix; prints each line of the table as it is there."""
    costs: dict[str, Costs] = {name: {} for name in QUANTIZERS}
    for quantizer in QUANTIZERS.values():
        quantizer.quantize(*random_case(64, 64), bits=2)  # loads what is compiled
    print(f"| {heading} | " + " | ".join(QUANTIZERS) + " |\n|" + "---|" * (len(QUANTIZERS) + 1))
    for size in doubling(256, largest):
        weight, moment = random_case(size, size)
        for name, quantizer in QUANTIZERS.items():
            _, costs[name][size] = cold_median(quantizer, weight, moment, repeats=5 if size <= 1024 else 1)
        print(f"| {size} | " + " | ".join(f"{costs[name][size]:.2f}" for name in QUANTIZERS) + " |", flush=True)
    return costs


def calibrate(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    """The calibration pass of a fit that allocates bits by block influence."""
    trainers = TrainerFactory({"accelerator": "cpu"}, logger=None)
    trainer = trainers.make(precision=trainers.working_precision)
    trainer.validate(CalibrationModule(adapter, batches), verbose=False)


def calibration_costs(most: int, heading: str) -> Costs:
    """CPU seconds of the calibration pass by tokens; prints each line of the table as it is there."""
    adapter = adapt(load_language_model())
    data = CalibrationData(samples=WINDOWS, text_ratio=1.0, text_length=WINDOW, holdout=0.0, batch_size=BATCH)
    data.attach(load_tokenizer())
    loaded = list(data.calibration_dataloader())
    calibrate(adapter, loaded[:1])  # what only the first pass of a process does
    costs: Costs = {}
    print(f"\n| {heading} | calibration |\n|---|---|")
    for tokens in doubling(FEWEST_TOKENS, most):
        batches = list(islice(cycle(loaded), tokens // (BATCH * WINDOW)))
        _, costs[tokens] = timed(lambda: calibrate(adapter, batches))  # noqa: B023
        print(f"| {tokens} | {costs[tokens]:.1f} |", flush=True)
    return costs


def main() -> None:
    """Print Markdown tables and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=4096, help="matrix: 256 times a power of two, at least 512")
    parser.add_argument("--tokens", type=int, default=32768, help="2048 times a power of two, at least 4096")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    unit = f"CPU s at threads: {options.threads}"
    quantizers = quantization_costs(options.largest, f"rows and columns; {unit}")
    calibration = calibration_costs(options.tokens, f"tokens; {unit}")
    curves = quantizers | {"calibration": calibration}
    print("\n" + ", ".join(f"{name}: exponent {exponent(costs):.2f}" for name, costs in curves.items()))
    if options.picture:
        draw(quantizers, calibration, options.picture)


if __name__ == "__main__":
    main()
