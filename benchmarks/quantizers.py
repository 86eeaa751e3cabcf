"""Every quantizer on the same real matrices: relative proxy loss, true bits and CPU time.

usage: python -m benchmarks.quantizers [--tokens 32768] [--blocks 0 15 29] [--bits 2]

All seven linears of each block of SmolLM2-135M, second moments of the original model on Python's own documentation.
"""

import argparse
import math
import pydoc_data.topics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from casp_pl.layers import QuantizedLinear
from casp_pl.linalg.losses import relative_proxy_loss
from casp_pl.models import adapt
from casp_pl.models.demo.language import load_language_model, load_tokenizer
from casp_pl.quantizers import AQLMQuantizer, GPTQQuantizer, Quantizer, QuIPSharpQuantizer, RTNQuantizer

WINDOW = 512
QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "RTN g64": lambda: RTNQuantizer(),
    "GPTQ g64 act-order": lambda: GPTQQuantizer(group_size=64, order="activation"),
    "QuIP# E8P": lambda: QuIPSharpQuantizer(),
    "AQLM": lambda: AQLMQuantizer(),
}


@torch.inference_mode()
def load_cases(blocks: list[int], tokens: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> weight (O, I) and mean second moment of its inputs (I, I)."""
    adapter, tokenizer = adapt(load_language_model()), load_tokenizer()
    prose = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    windows = tokenizer(prose, return_tensors="pt").input_ids[0, :tokens].view(-1, WINDOW)
    moments: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[object, tuple[Tensor, ...]], None]:
        def hook(_: object, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, 1)
            moments[name] = moments.get(name, torch.zeros(())) + x.T @ x / tokens

        return hook

    for block in blocks:
        for name in adapter.group_heads:
            adapter.blocks[block].get_submodule(name).register_forward_pre_hook(watch(f"{block} {name}"))
    for window in windows:
        adapter.decoder(window[None])
    return {
        f"{block} {name}": (adapter.blocks[block].get_submodule(name).weight.detach(), moments[f"{block} {group[0]}"])
        for block in blocks
        for group in adapter.linear_groups
        for name in group
    }


def main() -> None:
    """Print two Markdown tables: losses by matrix, and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens, a multiple of 512")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 15, 29])
    parser.add_argument("--bits", type=int, default=2)
    options = parser.parse_args()
    cases = load_cases(options.blocks, options.tokens)
    losses: dict[str, list[float]] = {name: [] for name in QUANTIZERS}
    stored, weights, seconds = dict.fromkeys(QUANTIZERS, 0), 0, dict.fromkeys(QUANTIZERS, 0.0)
    print("| matrix | " + " | ".join(QUANTIZERS) + " |\n|" + "---|" * (len(QUANTIZERS) + 1))
    for case, (weight, moment) in cases.items():
        weights += weight.numel()
        for name, make in QUANTIZERS.items():
            start = time.process_time()
            layer: QuantizedLinear = make().quantize(weight, moment, bits=options.bits)
            seconds[name] += time.process_time() - start
            losses[name].append(float(relative_proxy_loss(weight, layer.dequantize(), moment)))
            stored[name] += layer.storage_bits
        print(f"| {case} | " + " | ".join(f"{losses[name][-1]:.5f}" for name in QUANTIZERS) + " |", flush=True)
    print("\n| quantizer | geometric mean | mean | bits in all | CPU s |\n|" + "---|" * 5)
    for name, values in losses.items():
        geometric, mean = math.exp(sum(map(math.log, values)) / len(values)), sum(values) / len(values)
        print(f"| {name} | {geometric:.5f} | {mean:.5f} | {stored[name] / weights:.3f} | {seconds[name]:.1f} |")


if __name__ == "__main__":
    main()
