"""Where the time of the quantizers goes, and how much of it is products of matrices at the rate of this machine.

usage: python -m benchmarks.shares [--blocks 15] [--tokens 8192] [--threads 1]

CPU seconds of all linears of the blocks, without a profiler. `at rate` is the share of these in which large products
of the same dtypes, float32 and float64, would do as many operations as the products here. The other shares are of the
wall time under torch's profiler, which slows small operations down: `products` are torch's matrix products, `loops`
what numba compiled (`casp_pl.kernels`), `rest` is everything else that torch does, `outside` Python and what no
profiler sees.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.clock import gemm_rate
from benchmarks.growth import QUANTIZERS
from benchmarks.matrices import real_matrices
from casp_pl.quantizers import Quantizer

PRODUCTS = {
    "aten::mm": 0, "aten::bmm": 0, "aten::mv": 0, "aten::addmm": 1, "aten::baddbmm": 1, "aten::addmv": 1,
    "aten::addmm_": 1, "aten::baddbmm_": 1, "aten::addmv_": 1,
}  # fmt: skip
"""Matrix products -> which argument is the left factor; the right one is the next."""
LOOPS = "casp_pl::"
RATED = {"float": torch.float32, "double": torch.float64}
"""The profiler's names of the dtypes that products are computed in."""

Matrices = Sequence[tuple[Tensor, Tensor]]


def seconds(quantizer: Quantizer, matrices: Matrices, clock: Callable[[], float]) -> float:
    """Of one pass over all matrices."""
    start = clock()
    for weight, moment in matrices:
        quantizer.quantize(weight, moment, bits=2)
    return clock() - start


def seconds_at_rate(profiler: profile, rates: Mapping[str, float]) -> float:
    """In which large products do as many operations, each in its dtype; torch itself counts none of those in place."""
    if profiler.profiler is None or profiler.profiler.kineto_results is None:
        raise RuntimeError("the profiler has not run")
    operations = dict.fromkeys(rates, 0)
    for event in profiler.profiler.kineto_results.events():
        if event.name() in PRODUCTS:
            first = PRODUCTS[event.name()]
            left, right = event.shapes()[first : first + 2]
            operations[event.dtypes()[first]] += 2 * math.prod(left) * (right[-1] if len(right) > 1 else 1)
    return sum(count / rates[name] for name, count in operations.items())


def measure(quantizer: Quantizer, matrices: Matrices, rates: Mapping[str, float]) -> tuple[list[str], str]:
    """Cells of a quantizer's line, and the ten operations that take longest."""
    quantizer.quantize(*matrices[0], bits=2)  # loads what is compiled
    total = seconds(quantizer, matrices, time.process_time)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        profiled = seconds(quantizer, matrices, time.perf_counter)  # the profiler's seconds are those of a wall clock
    events = {event.key: 1e-6 * event.self_cpu_time_total for event in profiler.key_averages()}
    products = sum(events.get(key, 0.0) for key in PRODUCTS)
    loops = sum(spent for key, spent in events.items() if key.startswith(LOOPS))
    rest = sum(events.values()) - products - loops
    outside = max(profiled - products - loops - rest, 0.0)
    shares = [seconds_at_rate(profiler, rates) / total, *(part / profiled for part in (products, loops, rest, outside))]
    longest = sorted(events.items(), key=lambda item: -item[1])[:10]
    return (
        [f"{total:.2f}", *(f"{100 * share:.0f} %" for share in shares)],
        ", ".join(f"{key.split('::')[-1]} {spent:.2f} s" for key, spent in longest),
    )


def main() -> None:
    """Print a Markdown table, and the ten operations that take longest of every quantizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[15])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    matrices = list(real_matrices(options.blocks, options.tokens).values())
    rates = {name: gemm_rate(dtype=dtype) for name, dtype in RATED.items()}
    print("large products: " + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()) + "\n")
    lines = []
    for name, quantizer in QUANTIZERS.items():
        cells, longest = measure(quantizer, matrices, rates)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(f"{name}: {longest}", flush=True)
    unit = f"CPU s at threads: {options.threads}"
    print(f"\n| quantizer | {unit} | at rate | profiled: products | loops | rest | outside |\n|" + "---|" * 7)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
