"""QuIP# at 2 bits on Gaussian weights, where theory and the paper say what to expect.

usage: python -m benchmarks.gaussian

The E8P codebook alone (white inputs; QuIP#, arXiv 2402.04396, has 0.0912), then block LDLQ and its sweeps on 1024 x
1024 weights with correlated inputs, without anything that the paper does not have.
"""

import torch
from torch import Tensor

from casp_pl.linalg.losses import relative_proxy_loss
from casp_pl.quantizers import QuIPSharpQuantizer

SIZE = 1024


def loss(weight: Tensor, seen: Tensor, moment: Tensor, sweeps: int) -> float:
    """Relative proxy loss on `moment` of a weight quantized with the second moment `seen`."""
    paper = QuIPSharpQuantizer(search_scale=False, fit_vectors=False, candidate_runs=1, beam=1, sweeps=sweeps)
    return float(relative_proxy_loss(weight, paper.quantize(weight, seen, bits=2).dequantize(), moment))


def main() -> None:
    """Print a Markdown table."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(SIZE) + torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
    x = torch.randn(2 * SIZE, SIZE, generator=generator) @ mixing
    weight = 0.02 * torch.randn(SIZE, SIZE, generator=generator)
    moment, white = x.T @ x / len(x), torch.eye(SIZE)
    print("| inputs | codes | relative loss |\n|---|---|---|")
    print(f"| white | nearest point of E8P | {loss(weight, white, white, 0):.5f} |")
    print(f"| correlated | nearest point of E8P | {loss(weight, white, moment, 0):.5f} |")
    for sweeps in range(4):
        print(f"| correlated | LDLQ, {sweeps} sweeps | {loss(weight, moment, moment, sweeps):.5f} |", flush=True)


if __name__ == "__main__":
    main()
