"""Products with compressed weights against dense ones: one token, as in decoding, and many, as in reading a prompt.

usage: python -m benchmarks.kernels [--shapes 4096x4096 576x576] [--threads 1 2] [--repeats 15]

Contenders take turns and times are medians. One token walks through enough copies of a layer that they lie in memory,
not in a cache, as the layers of a large model do; of small shapes through 400 at most, which is less. GPTQ's columns
are in groups by activation, as its recipes order them. The limit is what has to be read, codes and tables or a dense
weight, divided by the bandwidth of so many threads; of many tokens it is the product at the rate of a large one. Both
rates are measured once for every number of threads and printed first. Errors are relative to the largest output, which
torch computes in float64 with the weight that it decodes in float64. The first shape of a run has taken up to 2.5
times as long as when it came later, so it is measured once more before, and thrown away. The package aqlm runs with
one thread only: with two its results are wrong.
"""

import argparse
import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.clock import bandwidth, gemm_rate, medians
from casp_pl.kernels.lattice import LATTICE_STAGES
from casp_pl.layers import AdditiveLinear, LatticeLinear, QuantizedLinear, UniformLinear

SHAPES = ["4096x4096", "11008x4096", "4096x11008", "576x576", "192x576", "1536x576", "576x1536"]
CACHE = 96 << 20  # bytes that no cache holds
MOST_COPIES = 400
PROMPT = 256
GROUP = 64

Make = Callable[[int, int], QuantizedLinear]


def sizes(shape: str) -> tuple[int, int]:
    """131x75 -> (131, 75)."""
    rows, columns = map(int, shape.split("x"))
    return rows, columns


def additive(books: int) -> Make:
    """AQLM with so many codebooks and random codes."""

    def make(rows: int, columns: int) -> AdditiveLinear:
        codes = torch.randint(0, 256, (rows, columns // 8, books), dtype=torch.uint8)
        return AdditiveLinear.from_codes(codes, torch.randn(books, 256, 8), torch.rand(rows, 1), in_features=columns)

    return make


def lattice(bits: int) -> Make:
    """QuIP# with random codes."""

    def make(rows: int, columns: int) -> LatticeLinear:
        codes = [torch.randint(0, 1 << 8 * stage.num_bytes, (rows, columns // 8)) for stage in LATTICE_STAGES[bits]]
        return LatticeLinear.from_codes(torch.stack(codes), torch.randn(columns), torch.randn(rows), bits=bits)

    return make


def uniform(bits: int) -> Make:
    """GPTQ with groups of 64 columns anywhere in a row, and random codes."""

    def make(rows: int, columns: int) -> UniformLinear:
        codes, zeros = (torch.randint(0, 1 << bits, (rows, n), dtype=torch.uint8) for n in (columns, columns // GROUP))
        groups = torch.randperm(columns) // GROUP
        return UniformLinear.from_codes(
            codes, zeros, torch.rand(zeros.shape), bits=bits, group_size=GROUP, column_groups=groups
        )

    return make


LAYERS: dict[str, Make] = {
    "AQLM 1x8": additive(1), "AQLM 2x8": additive(2), "AQLM 3x8": additive(3), "AQLM 4x8": additive(4),
    "E8P": lattice(2), "E8P 3 bits": lattice(3), "E8P 4 bits": lattice(4),
    "GPTQ 2": uniform(2), "GPTQ 3": uniform(3), "GPTQ 4": uniform(4), "GPTQ 8": uniform(8),
}  # fmt: skip


PEER, PEER_OF = "aqlm package", "AQLM 2x8"  # whose codes it gets
COLUMNS = ["dense", PEER, *LAYERS]

Layer = Callable[[Tensor], Tensor]
Calls = Sequence[Callable[[], Tensor]]


class Rates(NamedTuple):
    """What the machine does a second with some number of threads: bytes read, and float32 operations of a product."""

    reading: float
    multiplying: float


def package(layer: AdditiveLinear, x: Tensor) -> Callable[[], Tensor]:
    """The kernel of the package aqlm on the codes of a layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it scripts its decoder with torch.jit, which torch deprecates
        from aqlm.inference_kernels.numba_kernel import numba_gemm_lut
    codes = layer.codes_unpacked().permute(1, 0, 2).contiguous().view(torch.int8)
    books, scales = layer.codebooks.detach()[:, :, None], layer.scales.detach()[:, :, None, None]
    return lambda: numba_gemm_lut(x, codes, books, scales, None)


def calls(layers: Sequence[Layer], x: Tensor) -> Calls:
    """The product with every layer."""
    return [partial(layer, x) for layer in layers]


def exact(layer: nn.Linear | QuantizedLinear, x: Tensor) -> Tensor:
    """The product in float64, which our loops do not know: torch decodes the weight."""
    wide = copy.deepcopy(layer).double()
    weight = wide.weight if isinstance(wide, nn.Linear) else wide.dequantize()
    return x.double() @ weight.T


def lines(shape: str, threads: int, contenders: Mapping[str, Calls], limits: Mapping[str, float],
          products: Mapping[str, Tensor], repeats: int) -> list[str]:  # fmt: skip
    """Three lines of a table: times, limits in seconds and what of them is reached, errors."""
    seconds = medians(contenders, repeats)
    rows: dict[str, dict[str, str]] = {"ms (times faster than dense)": {}, "limit, ms (reached)": {}, "error": {}}
    times, reached, errors = rows.values()
    for name, own in contenders.items():
        times[name] = f"{1e3 * seconds[name]:.3f} ({seconds['dense'] / seconds[name]:.2f}x)"
        reached[name] = f"{1e3 * limits[name]:.3f} ({limits[name] / seconds[name]:.0%})"
        errors[name] = f"{float((own[0]() - products[name]).abs().max() / products[name].abs().max()):.0e}"
    return [
        f"| {shape} | {threads} | {what} | {' | '.join(cells.get(name, '-') for name in COLUMNS)} |"
        for what, cells in rows.items()
    ]


def one_token(rows: int, columns: int, threads: int, rates: Rates, repeats: int) -> list[str]:
    """Lines of a shape."""
    x = torch.randn(1, columns)
    count = -(-CACHE // (4 * rows * columns))
    layers: dict[str, list[nn.Linear | QuantizedLinear]] = {
        "dense": [nn.Linear(columns, rows, bias=False) for _ in range(count)]
    }
    limits = {"dense": 4 * rows * columns / rates.reading}
    for name, make in LAYERS.items():
        first = make(rows, columns)
        copies = min(MOST_COPIES, -(-CACHE // first.nbytes)) - 1
        layers[name] = [first, *(make(rows, columns) for _ in range(copies))]
        limits[name] = first.nbytes / rates.reading
    contenders = {name: calls(own, x) for name, own in layers.items()}
    products = {name: exact(own[0], x) for name, own in layers.items()}
    if threads == 1:
        contenders[PEER] = [package(layer, x) for layer in layers[PEER_OF] if isinstance(layer, AdditiveLinear)]
        products[PEER], limits[PEER] = products[PEER_OF], limits[PEER_OF]
    return lines(f"{rows}x{columns}", threads, contenders, limits, products, repeats)


def prompt(rows: int, columns: int, threads: int, rates: Rates, repeats: int) -> list[str]:
    """Lines of a shape."""
    x = torch.randn(PROMPT, columns)
    layers: dict[str, nn.Linear | QuantizedLinear] = {"dense": nn.Linear(columns, rows, bias=False)}
    layers |= {name: make(rows, columns) for name, make in LAYERS.items()}
    limits = dict.fromkeys(layers, 2 * PROMPT * rows * columns / rates.multiplying)
    contenders = {name: calls([layer], x) for name, layer in layers.items()}
    products = {name: exact(layer, x) for name, layer in layers.items()}
    return lines(f"{rows}x{columns}", threads, contenders, limits, products, repeats)


@torch.no_grad()
def main() -> None:
    """Print the rates of the machine and two Markdown tables with the same columns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxCOLUMNS")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    shapes = [sizes(shape) for shape in options.shapes]
    rates: dict[int, Rates] = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for measure in (one_token, prompt):
            measure(*shapes[0], threads, Rates(1, 1), 1)
        rates[threads] = Rates(bandwidth(), gemm_rate())
        reading, multiplying = (rate / 1e9 for rate in rates[threads])
        print(f"Threads: {threads}. Reads {reading:.1f} GB/s, multiplies at {multiplying:.0f} GFLOP/s.\n", flush=True)
    for title, measure in (("One token", one_token), (f"{PROMPT} tokens", prompt)):
        print(f"{title}\n\n| shape | threads | | {' | '.join(COLUMNS)} |\n|{'---|' * (3 + len(COLUMNS))}")
        for shape in shapes:
            for threads in options.threads:
                torch.set_num_threads(threads)
                print("\n".join(measure(*shape, threads, rates[threads], options.repeats)), flush=True)
        print()


if __name__ == "__main__":
    main()
