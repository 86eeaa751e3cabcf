"""Whether every kernel computes what its formula says: races, rounding errors and gradients in one Markdown table.

usage: python -m benchmarks.correctness [--shapes 131x75 128x256] [--calls 400]

Formulas are written down here once more, in float64, on the codes as they were drawn, before they were packed. Errors
are relative to the largest value: of the weight (`dequantize`), of products with tokens that are looked up or with 35,
for which the weight is rebuilt, and of their gradients against float64's autograd. `same bits` says that all calls
with two threads gave the same, forward and backward. gradcheck runs in float64, so by torch, on layers of 5 x 13: the
compiled loops are for float32, and the errors are theirs. Weights of more than four million entries are rebuilt
backwards; they take its fast mode and are called a twentieth as often.

The exit code is 1 where a row fails: bits that differ, an error above 1e-5, or gradients that are not the slopes.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numba
import torch
from torch import Tensor

from benchmarks.kernels import sizes
from casp_pl.kernels.divergence import head_divergence, head_divergence_reference
from casp_pl.kernels.lattice import LATTICE_STAGES, QUARTER, LatticeStage, decode_e8p_reference, e8_residual
from casp_pl.layers import AdditiveLinear, LatticeLinear, QuantizedLinear, UniformLinear
from casp_pl.linalg.orthogonal import transform_matrix

SHAPES = ["131x75", "128x256"]
LARGE = "2049x2056"  # more than four million weights
TOO_LARGE = ("AQLM 2x8", "E8P 4 bits", "GPTQ 2")
TINY = (5, 13)
FEW, PROMPT = (1, 5), 35  # tokens; of five, four share what is decoded
GROUP = 24
LIMIT = 1e-5


class Case(NamedTuple):
    """A layer with random codes and bias, and what its weight should be.

    Attributes:
        layer: in float32.
        formula: the tables of the layer in float64, in their order -> the weight (O, I), by operations of torch.
    """

    layer: QuantizedLinear
    formula: Callable[..., Tensor]


Make = Callable[[int, int], Case]
Compute = Callable[[], Sequence[Tensor]]


def additive(books: int, entries: int = 256) -> Make:
    """AQLM with so many codebooks of so many entries for groups of 8."""

    def make(rows: int, columns: int) -> Case:
        codes = torch.randint(entries, (rows, -(-columns // 8), books))
        tables = torch.randn(books, entries, 8), torch.rand(rows, 1) + 0.5

        def formula(codebooks: Tensor, scales: Tensor) -> Tensor:
            chosen = [codebooks[k][codes[..., k]] for k in range(books)]
            return (torch.stack(chosen).sum(dim=0).flatten(1) * scales)[:, :columns]

        return Case(AdditiveLinear.from_codes(codes, *tables, in_features=columns, bias=torch.randn(rows)), formula)

    return make


def points(codes: Tensor, stage: LatticeStage) -> Tensor:
    """What codes (O, G) of a stage stand for (O, 8 G), in float64."""
    if stage.kind == "e8p":
        own = decode_e8p_reference(codes.flatten()).double()
    else:
        own = e8_residual(codes.device)[codes.flatten()].double() * QUARTER
    return own.view(len(codes), -1) / stage.scale


def lattice(bits: int) -> Make:
    """QuIP# with so many bits a weight."""

    def make(rows: int, columns: int) -> Case:
        groups = -(-columns // 8)
        codes = [torch.randint(1 << 8 * stage.num_bytes, (rows, groups)) for stage in LATTICE_STAGES[bits]]
        total = torch.stack([points(*own) for own in zip(codes, LATTICE_STAGES[bits], strict=True)]).sum(dim=0)
        dense = transform_matrix(rows).T @ total @ transform_matrix(8 * groups)
        vectors = torch.randn(columns), torch.randn(rows)
        layer = LatticeLinear.from_codes(torch.stack(codes), *vectors, bits=bits, bias=torch.randn(rows))
        return Case(layer, lambda su, sv: sv[:, None] * dense[:, :columns] * su)

    return make


def uniform(bits: int) -> Make:
    """GPTQ with groups of 24 columns anywhere in a row."""

    def make(rows: int, columns: int) -> Case:
        groups = torch.randperm(columns) // GROUP
        codes, zeros = (torch.randint(1 << bits, (rows, n)) for n in (columns, -(-columns // GROUP)))
        layer = UniformLinear.from_codes(
            codes, zeros, torch.rand(zeros.shape), bits=bits, group_size=GROUP, column_groups=groups,
            bias=torch.randn(rows),
        )  # fmt: skip
        return Case(layer, lambda scales: (codes - zeros[:, groups]) * scales[:, groups])

    return make


LAYERS: dict[str, Make] = {
    **{f"AQLM {books}x8": additive(books) for books in (1, 2, 3, 4)},
    **{f"E8P {bits} bits": lattice(bits) for bits in LATTICE_STAGES},
    **{f"GPTQ {bits}": uniform(bits) for bits in (2, 3, 4, 8)},
}


OF_FEW_NUMBERS = {**LAYERS, **{f"AQLM {books}x8": additive(books, entries=8) for books in (1, 2, 3, 4)}}
"""The same for gradcheck, which turns every number of a table."""


class Work(NamedTuple):
    """Something that is computed twice.

    Attributes:
        name: in the table.
        ours: the package's way, in float32.
        inputs: what it depends on.
        formula: the same of `exact`, which are the inputs in float64.
        exact: leaves of float64's graph.
    """

    name: str
    ours: Callable[[], Tensor]
    inputs: list[Tensor]
    formula: Callable[..., Tensor]
    exact: list[Tensor]


def doubled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in float64 that want gradients."""
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def works(case: Case, x: Tensor) -> list[Work]:
    """The weight of a layer, and its product with inputs x (N, I)."""
    layer, formula = case.layer, case.formula
    tables: list[Tensor] = list(layer.tables().values())
    if layer.bias is None:
        raise ValueError("a case has a bias")
    inputs = [x, layer.bias, *tables]
    return [
        Work("weight", layer.dequantize, tables, formula, doubled(tables)),
        Work(f"{len(x)} rebuilt", lambda: layer(x), inputs, lambda x, b, *t: x @ formula(*t).T + b, doubled(inputs)),
    ]


def with_gradients(y: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """A result, and the gradients of the sum of its values times numbers that are always the same."""
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, tensors, pull)]


def worst(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, exact, strict=True))


def same_bits(compute: Compute, calls: int) -> bool:
    """Whether all calls with two threads give the same bits."""
    torch.set_num_threads(2)
    first = compute()
    return all(all(map(torch.equal, compute(), first)) for _ in range(calls))


def slopes(work: Work, *, fast: bool = False) -> bool:
    """Whether gradients are what finite differences are. gradcheck changes the inputs in place, and back."""
    return torch.autograd.gradcheck(lambda *_: work.ours(), work.inputs, fast_mode=fast, raise_exception=False)


def line(cells: Sequence[str], same: bool, errors: Sequence[float | None], slope: bool | None) -> bool:
    """Print a line of the table; returns whether all in it is well."""
    said = {None: "-", True: "yes", False: "NO"}
    numbers = ["-" if error is None else f"{error:.0e}" for error in errors]
    print("| " + " | ".join([*cells, said[same], *numbers, said[slope]]) + " |", flush=True)
    return same and slope is not False and all(error is None or error < LIMIT for error in errors)


def compared(name: str, shape: str, work: Work, slope: bool | None, calls: int) -> bool:
    """The line of something that has gradients."""

    def compute() -> list[Tensor]:
        return with_gradients(work.ours(), work.inputs)

    same, ours, exact = same_bits(compute, calls), compute(), with_gradients(work.formula(*work.exact), work.exact)
    return line([name, shape, work.name], same, [worst(ours[:1], exact[:1]), worst(ours[1:], exact[1:])], slope)


def looked_up(name: str, shape: str, case: Case, tokens: int, calls: int) -> bool:
    """The line of a product with a few tokens, which no gradient is wanted of."""
    work = works(case, torch.randn(tokens, case.layer.in_features))[1]
    with torch.no_grad():
        same = same_bits(lambda: [work.ours()], calls)
        error = worst([work.ours()], [work.formula(*work.exact)])
    return line([name, shape, f"{tokens} looked up"], same, [error, None], None)


@cache
def gradchecks(name: str) -> list[bool]:
    """Of the weight and of the product with three tokens."""
    case = OF_FEW_NUMBERS[name](*TINY)
    case.layer.double()
    return [slopes(work) for work in works(case, torch.randn(3, TINY[1], dtype=torch.float64, requires_grad=True))]


def of_layer(name: str, shape: str, calls: int) -> bool:
    """All lines of a layer."""
    case = LAYERS[name](*sizes(shape))
    both = works(case, torch.randn(PROMPT, case.layer.in_features, requires_grad=True))
    well = [looked_up(name, shape, case, tokens, calls) for tokens in FEW]
    well += [compared(name, shape, *pair, calls) for pair in zip(both, gradchecks(name), strict=True)]
    return all(well)


def rebuilt_backwards(name: str, calls: int) -> bool:
    """The line of a product with a weight that is too large to keep."""
    case = LAYERS[name](*sizes(LARGE))
    columns = case.layer.in_features
    work = works(case, torch.randn(PROMPT, columns, requires_grad=True))[1]
    exact = LAYERS[name](*sizes(LARGE))
    exact.layer.double()
    slope = slopes(works(exact, torch.randn(3, columns, dtype=torch.float64, requires_grad=True))[1], fast=True)
    return compared(name, LARGE, work, slope, calls)


def divergence(calls: int) -> bool:
    """The line of the loss of end-to-end training, which works in float32 whatever it is given."""
    student, teacher, head = (torch.randn(n, 75) for n in (131, 131, 997))
    inputs = [student.requires_grad_()]
    work = Work(
        "loss",
        lambda: head_divergence(student, teacher, head),
        inputs,
        lambda exact: head_divergence_reference(exact, teacher.double(), head.double()),
        doubled(inputs),
    )
    return compared("divergence of logits", "997x75", work, None, calls)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxCOLUMNS")
    parser.add_argument("--calls", type=int, default=400)
    options = parser.parse_args()
    if numba.get_num_threads() < 2:
        parser.error("numba has one thread here, and a race needs two: NUMBA_NUM_THREADS=2 asks for them")
    torch.manual_seed(0)
    columns = f"| layer | shape | work | same bits, {options.calls} calls | error | error of gradients | gradcheck |"
    print(f"{columns}\n|{'---|' * (columns.count('|') - 1)}")
    well = [of_layer(name, shape, options.calls) for shape in options.shapes for name in LAYERS]
    well += [rebuilt_backwards(name, max(1, options.calls // 20)) for name in TOO_LARGE]
    well.append(divergence(options.calls))
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
