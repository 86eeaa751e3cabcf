"""Ours against AQLM as its authors released it: CPU seconds and relative proxy loss at 2 codebooks of 256 entries of 8.

usage: python -m benchmarks.aqlm [--tokens 32768] [--blocks 0 1 15 29] [--threads 1]
       python -m benchmarks.aqlm --random 4096x4096 11008x4096 --rounds 1

Random matrices are Gaussian, with a second moment whose spectrum falls as 1 / rank in a random basis, as activations'
do. There the baseline takes hours. `--rounds` stops it early: its loss is then that of so many rounds, its seconds are
less than it would take, so a ratio of seconds is a least one and none of losses is printed. Ours is measured
`--repeats` times, and the median counts; the baseline, which takes twenty times as long or more, once. Every run of
either makes all of the second moment anew; in a fit linears that read the same input share what is made of it.
"""

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.clock import timed
from benchmarks.cold import cold_median
from benchmarks.matrices import real_matrices
from benchmarks.official_aqlm import official_aqlm
from casp_pl.linalg.losses import relative_proxy_loss
from casp_pl.quantizers import AQLMQuantizer

OURS = AQLMQuantizer(formats={2: [[2, 256, 8]]})


def random_case(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight (O, I) and a second moment (I, I) of condition number I."""
    generator = torch.Generator().manual_seed(rows)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    moment = (basis / torch.arange(1, columns + 1)) @ basis.T
    return torch.randn(rows, columns, generator=generator) / math.sqrt(columns), (moment + moment.T) / 2


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, weight and second moment of every matrix."""
    for shape in options.random:
        rows, columns = map(int, shape.split("x"))
        yield f"random {shape}", *random_case(rows, columns)
    if not options.random:
        for (block, linear), case in real_matrices(options.blocks, options.tokens).items():
            yield f"{block} {linear} {'x'.join(map(str, case[0].shape))}", *case


def heading(threads: int) -> str:
    """Of the table."""
    seconds = f"CPU s at threads: {threads}"
    names = [
        "matrix",
        f"official: {seconds}",
        "rounds",
        "loss",
        f"ours: {seconds}",
        "loss",
        "CPU s ratio",
        "loss ratio",
    ]
    return f"| {' | '.join(names)} |\n|" + "---|" * len(names)


def summary(slow: float, fast: float, ratios: Sequence[float], cases: int) -> str:
    """Last line of the table; loss ratios are known of the matrices whose baseline ended by itself."""
    mean = f"{statistics.geometric_mean(ratios):.3f} (geometric mean of {len(ratios)})" if ratios else ""
    ratio = f"{'' if len(ratios) == cases else 'at least '}{slow / fast:.0f}"
    return f"| all | {slow:.1f} | | | {fast:.2f} | | {ratio} | {mean} |"


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens, a multiple of 512")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 1, 15, 29])
    parser.add_argument("--random", nargs="+", default=[], metavar="ROWSxCOLUMNS")
    parser.add_argument("--repeats", type=int, default=5, help="of ours")
    parser.add_argument("--rounds", type=int, default=1000, help="of the baseline at most")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(heading(options.threads))
    OURS.quantize(*random_case(16, 16), bits=2)  # loads what is compiled
    slow_total, fast_total, ratios, count = 0.0, 0.0, list[float](), 0
    for name, weight, moment in cases(options):
        official, slow = timed(lambda: official_aqlm(weight, moment, rounds=options.rounds))  # noqa: B023
        layer, fast = cold_median(OURS, weight, moment, options.repeats)
        ours = layer.dequantize().detach()
        losses = [float(relative_proxy_loss(weight, made, moment)) for made in (official.weight, ours)]
        slow_total, fast_total, count = slow_total + slow, fast_total + fast, count + 1
        if official.ended:
            ratios.append(losses[1] / losses[0])
        rounds = f"{official.rounds}{'' if official.ended else ', stopped'}"
        ratio = f"{'' if official.ended else 'at least '}{slow / fast:.0f}"
        print(
            f"| {name} | {slow:.1f} | {rounds} | {losses[0]:.6f} | {fast:.2f} | {losses[1]:.6f} | {ratio} |"
            f" {f'{ratios[-1]:.3f}' if official.ended else ''} |",
            flush=True,
        )
    print(summary(slow_total, fast_total, ratios, count))


if __name__ == "__main__":
    main()
