"""Products with compressed weights against dense ones: one token, as in decoding, and many, as in reading a prompt.

usage: python -m benchmarks.kernels [--shapes 4096x4096 576x576] [--threads 1 2] [--repeats 15]

Contenders take turns and times are medians. One token walks through enough copies of a layer that they lie in memory,
not in a cache, as the layers of a large model do; of small shapes through 400 at most, which is less. GPTQ's columns
are in groups by activation, as its recipes order them. The limit is what has to be read, codes and tables or a dense
weight, divided by the bandwidth measured in the same run; of many tokens it is the product at the rate of a large one.
The package aqlm runs with one thread only: with two its results are wrong.
"""

import argparse
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.clock import bandwidth, gemm_rate, medians
from casp_pl.kernels.lattice import LATTICE_STAGES
from casp_pl.layers import AdditiveLinear, LatticeLinear, QuantizedLinear, UniformLinear

SHAPES = ["4096x4096", "11008x4096", "4096x11008", "576x576", "192x576", "1536x576", "576x1536"]
CACHE = 96 << 20  # bytes that no cache holds
MOST_COPIES = 400
PROMPT = 256
GROUP = 64

Make = Callable[[int, int], QuantizedLinear]


def additive(rows: int, columns: int) -> AdditiveLinear:
    """AQLM 2x8 with random codes."""
    codes = torch.randint(0, 256, (rows, columns // 8, 2), dtype=torch.uint8)
    return AdditiveLinear.from_codes(codes, torch.randn(2, 256, 8), torch.rand(rows, 1), in_features=columns)


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
    "AQLM 2x8": additive, "E8P": lattice(2), "E8P 3 bits": lattice(3), "E8P 4 bits": lattice(4),
    "GPTQ 2": uniform(2), "GPTQ 3": uniform(3), "GPTQ 4": uniform(4), "GPTQ 8": uniform(8),
}  # fmt: skip


def package(layer: AdditiveLinear, x: Tensor) -> Callable[[], Tensor]:
    """The kernel of the package aqlm on the codes of a layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it scripts its decoder with torch.jit, which torch deprecates
        from aqlm.inference_kernels.numba_kernel import numba_gemm_lut
    codes = layer.codes_unpacked().permute(1, 0, 2).contiguous().view(torch.int8)
    books, scales = layer.codebooks.detach()[:, :, None], layer.scales.detach()[:, :, None, None]
    return lambda: numba_gemm_lut(x, codes, books, scales, None)


def calls(layers: Sequence[torch.nn.Module], x: Tensor) -> list[Callable[[], Tensor]]:
    """The product with every layer."""
    return [lambda layer=layer: layer(x) for layer in layers]


def one_token(rows: int, columns: int, threads: int, repeats: int) -> None:
    """Print a line of the table for a shape."""
    x = torch.randn(1, columns)
    dense = [torch.nn.Linear(columns, rows, bias=False) for _ in range(-(-CACHE // (4 * rows * columns)))]
    contenders: dict[str, Sequence[Callable[[], object]]] = {"dense": calls(dense, x)}
    errors, read = {}, {}
    for name, make in LAYERS.items():
        first = make(rows, columns)
        copies = [first, *(make(rows, columns) for _ in range(min(MOST_COPIES, -(-CACHE // first.nbytes)) - 1))]
        contenders[name] = calls(copies, x)
        expected = x.double() @ first.dequantize().double().T
        errors[name] = float((first(x) - expected).abs().max() / expected.abs().max())
        read[name] = first.nbytes
        if name == "AQLM 2x8" and threads == 1:
            contenders["aqlm package"] = [package(layer, x) for layer in copies if isinstance(layer, AdditiveLinear)]
    seconds = medians(contenders, repeats)
    print(f"| {rows}x{columns} | {threads} | {1e3 * seconds['dense']:.3f} |", end="")
    print(f" {1e3 * seconds['aqlm package']:.2f} |" if threads == 1 else " |", end="")
    for name in LAYERS:
        print(f" {1e3 * seconds[name]:.3f} ({seconds['dense'] / seconds[name]:.2f}x) |", end="")
    print(f" {max(errors.values()):.0e} |")
    limits = {name: 1e3 * size / bandwidth() for name, size in (("dense", 4 * rows * columns), *read.items())}
    shares = [f"{limits[name]:.3f} ({limits[name] / (1e3 * seconds[name]):.0%})" for name in LAYERS]
    print(f"| limit (share of it reached) | | {limits['dense']:.3f} | | {' | '.join(shares)} | |", flush=True)


def prompt(rows: int, columns: int, threads: int, repeats: int) -> None:
    """Print a line of the table for a shape."""
    x = torch.randn(PROMPT, columns)
    dense = torch.nn.Linear(columns, rows, bias=False)
    layers = {name: make(rows, columns) for name, make in LAYERS.items()}
    seconds = medians({"dense": calls([dense], x), **{n: calls([layer], x) for n, layer in layers.items()}}, repeats)
    print(f"| {rows}x{columns} | {threads} | {1e3 * seconds['dense']:.2f} |", end="")
    for name in LAYERS:
        print(f" {1e3 * seconds[name]:.2f} ({seconds['dense'] / seconds[name]:.2f}x) |", end="")
    print(f" {2e3 * PROMPT * rows * columns / gemm_rate():.2f} |", flush=True)


@torch.no_grad()
def main() -> None:
    """Print two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxCOLUMNS")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    names = " | ".join(LAYERS)
    for title, measure, extra, limits in (
        ("One token, ms", one_token, " aqlm package |", "largest relative error"),
        (f"{PROMPT} tokens, ms", prompt, "", "limit of the product"),
    ):
        columns = f"| shape | threads | dense |{extra} {names} | {limits} |"
        print(f"\n{title} (times faster than dense)\n\n{columns}\n|{'---|' * (columns.count('|') - 1)}")
        for rows, columns_ in shapes:
            for threads in options.threads:
                torch.set_num_threads(threads)
                measure(rows, columns_, threads, options.repeats)


if __name__ == "__main__":
    main()
