"""Every quantizer on the same real matrices: relative proxy loss, true bits and CPU time.

usage: python -m benchmarks.quantizers [--tokens 32768] [--blocks 0 15 29] [--bits 2] [--threads 1]

All seven linears of each block of SmolLM2-135M, second moments of the original model on Python's own documentation.
Times are of one pass: those that read the same input share what is made of its second moment, as in a fit.
"""

import argparse
import math
import time

import torch

from benchmarks.aqlm import random_case
from benchmarks.matrices import real_matrices
from casp_pl.layers import QuantizedLinear
from casp_pl.linalg.losses import relative_proxy_loss
from casp_pl.quantizers import AQLMQuantizer, GPTQQuantizer, Quantizer, QuIPSharpQuantizer, RTNQuantizer

QUANTIZERS: dict[str, Quantizer] = {
    "RTN g64": RTNQuantizer(),
    "GPTQ g64 act-order": GPTQQuantizer(group_size=64, order="activation"),
    "QuIP# E8P": QuIPSharpQuantizer(),
    "AQLM": AQLMQuantizer(),
    "AQLM 2x8": AQLMQuantizer(formats={2: [[2, 256, 8]]}),
}


def main() -> None:
    """Print two Markdown tables: losses by matrix, and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens, a multiple of 512")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 15, 29])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = real_matrices(options.blocks, options.tokens)
    for quantizer in QUANTIZERS.values():
        quantizer.quantize(*random_case(64, 64), bits=options.bits)  # loads what is compiled
    losses: dict[str, list[float]] = {name: [] for name in QUANTIZERS}
    stored, weights, seconds = dict.fromkeys(QUANTIZERS, 0), 0, dict.fromkeys(QUANTIZERS, 0.0)
    print("| matrix | " + " | ".join(QUANTIZERS) + " |\n|" + "---|" * (len(QUANTIZERS) + 1))
    for (block, linear), (weight, moment) in cases.items():
        weights += weight.numel()
        for name, quantizer in QUANTIZERS.items():
            start = time.process_time()
            layer: QuantizedLinear = quantizer.quantize(weight, moment, bits=options.bits)
            seconds[name] += time.process_time() - start
            losses[name].append(float(relative_proxy_loss(weight, layer.dequantize(), moment)))
            stored[name] += layer.storage_bits
        print(
            f"| {block} {linear} | " + " | ".join(f"{losses[name][-1]:.5f}" for name in QUANTIZERS) + " |", flush=True
        )
    unit = f"CPU s at threads: {options.threads}"
    print(f"\n| quantizer | geometric mean | mean | bits in all | {unit} |\n|" + "---|" * 5)
    for name, values in losses.items():
        geometric, mean = math.exp(sum(map(math.log, values)) / len(values)), sum(values) / len(values)
        print(f"| {name} | {geometric:.5f} | {mean:.5f} | {stored[name] / weights:.3f} | {seconds[name]:.1f} |")


if __name__ == "__main__":
    main()
