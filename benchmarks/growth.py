"""How cost grows: CPU seconds of quantization against the size of a square matrix, and of calibration against tokens.

usage: python -m benchmarks.growth [--largest 4096] [--picture docs/pictures/growth.png]

Exponents are slopes of least squares in logarithms over the four largest sizes: below, fixed costs show. Matrices of up
to 1024 rows are quantized five times and the median counts; larger ones and calibration once.
"""

import argparse
import math
import statistics
from pathlib import Path

import matplotlib as mpl

from benchmarks.aqlm import random_case, timed
from benchmarks.matrices import real_matrices
from casp_pl.quantizers import AQLMQuantizer, GPTQQuantizer, Quantizer, QuIPSharpQuantizer

QUANTIZERS: dict[str, Quantizer] = {
    "GPTQ g64 act-order": GPTQQuantizer(group_size=64, order="activation"),
    "QuIP# E8P": QuIPSharpQuantizer(),
    "AQLM 2x8": AQLMQuantizer(formats={2: [[2, 256, 8]]}),
}
TOKENS = [4096, 8192, 16384, 32768]


def exponent(costs: dict[int, float]) -> float:
    """Slope of log cost over log size, of the four largest sizes."""
    points = [(math.log(size), math.log(cost)) for size, cost in sorted(costs.items())[-4:]]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def draw(curves: dict[str, dict[int, float]], path: Path) -> None:
    """Both families of curves beside each other in logarithmic axes."""
    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, costs in curves.items():
        axis = axes[name == "calibration"]
        axis.loglog(list(costs), list(costs.values()), "o-", label=f"{name}: exponent {exponent(costs):.2f}")
    for axis, label in zip(axes, ("rows and columns of the matrix", "calibration tokens"), strict=True):
        axis.set(xlabel=label, ylabel="CPU seconds")
        axis.grid(visible=True, which="both", alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print a Markdown table and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=4096, help="a power of two from 2048 on")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    curves: dict[str, dict[int, float]] = {name: {} for name in QUANTIZERS}
    for quantizer in QUANTIZERS.values():
        quantizer.quantize(*random_case(64, 64), bits=2)  # loads what is compiled
    sizes = [256 << step for step in range((options.largest // 256).bit_length())]
    print("| rows and columns | " + " | ".join(QUANTIZERS) + " |\n|" + "---|" * (len(QUANTIZERS) + 1))
    for size in sizes:
        weight, moment = random_case(size, size)
        for name, quantizer in QUANTIZERS.items():
            repeats = 5 if size <= 1024 else 1
            runs = [timed(lambda: quantizer.quantize(weight, moment, bits=2))[1] for _ in range(repeats)]  # noqa: B023
            curves[name][size] = statistics.median(runs)
        print(f"| {size} | " + " | ".join(f"{curves[name][size]:.2f}" for name in QUANTIZERS) + " |", flush=True)
    print("\n| calibration tokens | CPU s |\n|---|---|")
    curves["calibration"] = {}
    for tokens in TOKENS:
        _, curves["calibration"][tokens] = timed(lambda: real_matrices([0, 15, 29], tokens))  # noqa: B023
        print(f"| {tokens} | {curves['calibration'][tokens]:.1f} |", flush=True)
    print("\n" + ", ".join(f"{name}: exponent {exponent(costs):.2f}" for name, costs in curves.items()))
    if options.picture:
        draw(curves, options.picture)


if __name__ == "__main__":
    main()
