"""Which codebooks suit a small matrix? Every format on low-rank factors and key/value projections, at its true cost.

usage: python -m benchmarks.small_matrices [--tokens 2048] [--blocks 15] [--bits 2 3 4] [--matrices factor k v]

Losses are relative proxy losses. Formats of different total cost are compared by the excess, total bits + log2(loss) /
2. A loss that falls by 2^(-2 b) with b bits leaves it constant, so the lowest excess is the best use of the bits.
"""

import argparse
import math
from collections import defaultdict

import torch
from torch import Tensor

from benchmarks.matrices import real_matrices
from casp_pl.linalg.losses import relative_proxy_loss
from casp_pl.linalg.whitening import low_rank_factors, whitened_svd
from casp_pl.quantizers import AQLMQuantizer
from casp_pl.quantizers.low_rank import refit_output_factor

KEEP_RATIO, GRAIN = 0.25, 8
FORMATS = {
    2: [[2, 256, 8], [1, 256, 4], [4, 16, 8], [2, 16, 4], [1, 16, 2], [1, 4, 1]],
    3: [[3, 256, 8], [4, 64, 8], [2, 64, 4], [3, 16, 4], [1, 64, 2], [2, 8, 2], [1, 8, 1]],
    4: [[4, 256, 8], [2, 256, 4], [4, 16, 4], [1, 256, 2], [2, 16, 2], [1, 16, 1]],
}


def load_cases(blocks: list[int], tokens: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Matrices (O, I) with their second moments (I, I), by kind, one of each kind from every block."""
    cases = defaultdict(list)
    for (_, linear), (weight, moment) in real_matrices(blocks, tokens).items():
        name = linear.removeprefix("self_attn.").removesuffix("_proj")
        if name in ("q", "k", "v"):
            cases[f"{name} {tuple(weight.shape)}"].append((weight, moment))
        if name in ("q", "k"):
            for factor, seen in factors_of(weight, moment):
                cases[f"{name} factor {tuple(factor.shape)}"].append((factor, seen))
    return cases


def factors_of(weight: Tensor, moment: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The whitened low-rank factors with the second moments of what they see."""
    rank = int(KEEP_RATIO * weight.numel() / sum(weight.shape)) // GRAIN * GRAIN
    _, inner = low_rank_factors(weight, whitened_svd(weight, moment), rank)
    outer, seen = refit_output_factor(weight, moment, inner.float())
    return [(inner.float(), moment.clone()), (outer.float(), seen.float())]


def measure(cases: list[tuple[Tensor, Tensor]], bits: int, layout: list[int]) -> tuple[float, float]:
    """Total bits a weight and geometric mean of the losses of one format on matrices of one shape."""
    quantizer = AQLMQuantizer(formats={bits: [layout]})
    layers = [quantizer.quantize(weight, moment, bits=bits) for weight, moment in cases]
    losses = [
        relative_proxy_loss(weight, layer.dequantize(), moment)
        for (weight, moment), layer in zip(cases, layers, strict=True)
    ]
    return layers[0].bits_per_weight, math.exp(sum(map(math.log, losses)) / len(losses))


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="calibration tokens, a multiple of 512")
    parser.add_argument("--blocks", type=int, nargs="+", default=[15])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--matrices", nargs="+", default=[""], help="only kinds with one of these words in the name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| matrix | bits | codebooks | codebook bits | total bits | loss | excess |\n" + "|---" * 7 + "|")
    for name, cases in load_cases(options.blocks, options.tokens).items():
        if not any(word in name for word in options.matrices):
            continue
        for bits in options.bits:
            for layout in FORMATS[bits]:
                total, loss = measure(cases, bits, layout)
                table = 16 * math.prod(layout) / cases[0][0].numel()
                sizes = "x".join(map(str, layout))
                excess = total + math.log2(loss) / 2
                row = (name, bits, sizes, f"{table:.3f}", f"{total:.3f}", f"{loss:.6f}", f"{excess:.3f}")
                print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
