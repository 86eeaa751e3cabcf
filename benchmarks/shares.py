"""Where the time of the quantizers goes, and how much of it is products of matrices at the rate of this machine.

usage: python -m benchmarks.shares [--blocks 15 | --random 4096x4096] [--tokens 8192] [--threads 1]

CPU seconds of all linears of the blocks, or of random matrices instead, are those of a pass that nothing watches.
Shares are of these. `at rate` is the one in which large products of the same dtypes would do as many operations as the
products here: the part of the time that is matrix multiplication at this machine's rate. A second pass goes through a
dispatch mode, which keeps sums and no events: `products` is the share that torch's matrix products take, `loops` what
numba compiled (`casp_pl.kernels`), `other` everything else, Python included. Each call takes some microseconds longer
there, so the ten longest, which are listed below the table with their calls, are a little too long where there are
many. Both passes get new second moments and factorise them; linears that read the same input share one, as in a fit.
"""

import argparse
import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.aqlm import cases
from benchmarks.clock import gemm_rate, timed
from benchmarks.cold import with_fresh_moments
from benchmarks.growth import QUANTIZERS
from casp_pl.callbacks.report_markdown import markdown_table
from casp_pl.quantizers import Quantizer

PRODUCTS = {
    "mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "addmv": 1, "addmm_": 1, "baddbmm_": 1, "addmv_": 1,
    "addbmm": 1, "addbmm_": 1,
}  # fmt: skip
"""Matrix products -> which argument is the left factor; the right one is the next."""
LOOPS = "casp_pl::"
RATED = {"float32": torch.float32, "float64": torch.float64}
LISTED = 10

Matrices = Sequence[tuple[Tensor, Tensor]]


class Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """Adds up what torch computes inside of it, in constant memory.

    An operation that calls another one (`mv` is `addmv_`) is one operation: the mode sees the outer one only. What a
    compiled loop, marked by `record_function`, calls is the loop's.

    Attributes:
        seconds: CPU seconds by operation or loop.
        calls: how often each was called.
        operations: multiplications and additions of matrix products by dtype.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.operations: Counter[torch.dtype] = Counter()
        self._open: list[tuple[str, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes an operation, and adds it to the sums."""
        packet, name = func.overloadpacket, func.overloadpacket.__name__
        if packet is torch.ops.profiler._record_function_enter_new:
            self._open.append((args[0], time.process_time()))
            return func(*args, **(kwargs or {}))
        if packet is torch.ops.profiler._record_function_exit:
            self._add(*self._open.pop())
            return func(*args, **(kwargs or {}))
        if name in PRODUCTS:
            left, right = args[PRODUCTS[name] : PRODUCTS[name] + 2]
            self.operations[left.dtype] += 2 * math.prod(left.shape) * (right.shape[-1] if right.dim() > 1 else 1)
        if self._open:
            return func(*args, **(kwargs or {}))
        start = time.process_time()
        result = func(*args, **(kwargs or {}))
        self._add(name, start)
        return result

    def _add(self, name: str, start: float) -> None:
        self.seconds[name] += time.process_time() - start
        self.calls[name] += 1


class Shares(NamedTuple):
    """CPU seconds of a quantizer."""

    total: float
    at_rate: float
    products: float
    loops: float
    longest: str

    def cells(self) -> list[str]:
        """Of its line."""
        other = max(self.total - self.products - self.loops, 0.0)
        shares = [part / self.total for part in (self.at_rate, self.products, self.loops, other)]
        return [f"{self.total:.2f}", *(f"{100 * share:.0f} %" for share in shares)]


def run(quantizer: Quantizer, matrices: Matrices) -> None:
    """Quantize all matrices."""
    for weight, moment in matrices:
        quantizer.quantize(weight, moment, bits=2)


def measure(quantizer: Quantizer, matrices: Matrices, rates: Mapping[torch.dtype, float]) -> Shares:
    """Two cold passes over matrices (O, I) with their second moments (I, I), one of them through a tally.

    Args:
        quantizer: is called at 2 bits.
        matrices: those that share a moment share it here too.
        rates: operations that large products do in a CPU second.
    """
    one_of_each = {weight.shape: (weight, moment) for weight, moment in matrices}
    run(quantizer, with_fresh_moments(one_of_each.values()))  # loads what is compiled, makes transforms of these widths
    cold = with_fresh_moments(matrices)
    _, total = timed(lambda: run(quantizer, cold))
    cold, tally = with_fresh_moments(matrices), Tally()
    with tally:
        run(quantizer, cold)
    spent = tally.seconds
    longest = ", ".join(
        f"{name.removeprefix(LOOPS)} {seconds:.2f} s ({tally.calls[name]:,})"
        for name, seconds in sorted(spent.items(), key=lambda item: -item[1])[:LISTED]
    )
    return Shares(
        total,
        sum(count / rates[dtype] for dtype, count in tally.operations.items()),
        sum(spent[name] for name in PRODUCTS),
        sum(seconds for name, seconds in spent.items() if name.startswith(LOOPS)),
        longest,
    )


def main() -> None:
    """Print a Markdown table, and the ten operations that take longest of every quantizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[15])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--random", nargs="+", default=[], metavar="ROWSxCOLUMNS")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    matrices = [(weight, moment) for _, weight, moment in cases(options)]
    rates = {dtype: gemm_rate(dtype=dtype, clock=time.process_time) for dtype in RATED.values()}  # as the shares
    print(
        "Large products, a CPU second: "
        + ", ".join(f"{name} {rates[dtype] / 1e9:.0f} GFLOP" for name, dtype in RATED.items())
    )
    found = {name: measure(quantizer, matrices, rates) for name, quantizer in QUANTIZERS.items()}
    header = ["quantizer", f"CPU s at threads: {options.threads}", "at rate", "products", "loops", "other"]
    print(f"\n{markdown_table(header, [[name, *shares.cells()] for name, shares in found.items()])}\n")
    for name, shares in found.items():
        print(f"- {name}: {shares.longest}")


if __name__ == "__main__":
    main()
