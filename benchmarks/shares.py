"""Where the time of the quantizers goes, and how much of it is products of matrices at the rate of this machine.

usage: python -m benchmarks.shares [--blocks 15] [--tokens 8192] [--threads 1]

CPU time of all linears of the blocks by torch's profiler. `products` are torch's matrix products, `loops` what numba
compiled (`casp_pl.kernels`), `rest` is everything else that torch does, `outside` Python and what no profiler sees. `at
rate` is the time in which a large product does as many operations as the products here; what they take more is the
price of their shapes.
"""

import argparse
import time

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.clock import gemm_rate
from benchmarks.growth import QUANTIZERS
from benchmarks.matrices import real_matrices

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv")
LOOPS = "casp_pl::"


def main() -> None:
    """Print a Markdown table, and the ten operations that take longest of every quantizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[15])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    matrices, rate = list(real_matrices(options.blocks, options.tokens).values()), gemm_rate()
    lines = []
    print(f"large products: {rate / 1e9:.0f} GFLOP/s\n")
    for name, quantizer in QUANTIZERS.items():
        quantizer.quantize(*matrices[0], bits=2)  # loads what is compiled
        start = time.process_time()
        for weight, moment in matrices:
            quantizer.quantize(weight, moment, bits=2)
        total = time.process_time() - start  # without the profiler, which slows small operations down
        with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
            start = time.process_time()
            for weight, moment in matrices:
                quantizer.quantize(weight, moment, bits=2)
            profiled = time.process_time() - start
        events = {event.key: (1e-6 * event.self_cpu_time_total, event.flops) for event in profiler.key_averages()}
        products = sum(events[key][0] for key in PRODUCTS if key in events)
        loops = sum(seconds for key, (seconds, _) in events.items() if key.startswith(LOOPS))
        rest = sum(seconds for seconds, _ in events.values()) - products - loops
        at_rate = sum(events[key][1] for key in PRODUCTS if key in events) / rate
        shares = [products, at_rate, loops, rest, max(profiled - products - loops - rest, 0.0)]
        lines.append(f"| {name} | {total:.2f} | " + " | ".join(f"{100 * share / profiled:.0f} %" for share in shares))
        longest = sorted(events.items(), key=lambda item: -item[1][0])[:10]
        print(f"{name}: " + ", ".join(f"{key.split('::')[-1]} {seconds:.2f} s" for key, (seconds, _) in longest))
    print("\n| quantizer | CPU s | products | at rate | loops | rest | outside |\n|" + "---|" * 7)
    print("\n".join(f"{line} |" for line in lines))


if __name__ == "__main__":
    main()
