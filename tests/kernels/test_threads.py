"""No loop has a race: 400 calls with two threads give the bits of one thread. The package aqlm fails this."""

import importlib
import pkgutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import casp_pl.kernels
from casp_pl.kernels.additive import AdditiveIndex
from casp_pl.kernels.beam_search import beam_search, improve_codes
from casp_pl.kernels.compiled import lookup_loops
from casp_pl.kernels.lattice_nearest import e8p_candidates, e8p_nearest
from casp_pl.kernels.lookup import CodeRows
from casp_pl.kernels.nearest import nearest_entries
from casp_pl.kernels.packing import pack
from casp_pl.kernels.uniform import UniformCodes, dequantize_uniform
from casp_pl.kernels.vectors import LatticeBytes, UniformBytes
from casp_pl.layers.lattice_weight import lattice_points

Compute = Callable[[], tuple[Tensor, ...]]
TOKENS = 5  # four that share decoded vectors, and one
ROWS = 1031  # work for longer than it takes to wake a thread: two that follow one another show no race

NO_LOOPS = {"addresses", "contiguous", "multiply_group", "pointer", "tiles_of"}

# groups, codebooks, entries, group length, spans
TABLES = [(40, 2, 256, 8, 1), (90, 1, 72, 2, 1), (64, 1, 256, 4, 8), (9, 3, 256, 5, 4)]


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))


def _codes(limit: int, *shape: int) -> Tensor:
    return torch.randint(limit, shape, generator=torch.Generator().manual_seed(limit), dtype=torch.uint8)


def _additive(books: int, length: int, *, backward: bool) -> Compute:
    index, codebooks, scales = (
        AdditiveIndex(_codes(256, ROWS, 9, books), 256),
        _numbers(books, 256, length),
        _numbers(ROWS, 1),
    )
    weight = _numbers(ROWS, 9 * length)
    if backward:
        return lambda: index.gradients(weight, codebooks, scales)
    return lambda: (index.gather(codebooks, scales),)


def _looked_up(name: str, rows: int, shape: tuple[int, ...]) -> Compute:
    groups, books, entries, length, spans = shape
    if name not in lookup_loops():
        pytest.skip(f"this CPU does not run the loop {name}")
    codes = CodeRows(_codes(entries, rows, groups * books), lookup_loops()[name])
    x, codebooks, weights = _numbers(TOKENS, groups * length), _numbers(books, entries, length), _numbers(spans, rows)
    return lambda: (codes.multiply(x, codebooks, weights),)


def _lattice_bytes(bits: int) -> Compute:
    rows, x = LatticeBytes(_codes(256, ROWS, 12, bits), lookup_loops()["vectors"].vectors), _numbers(TOKENS, 96)
    return lambda: (rows.multiply(x),)


def _uniform_bytes(bits: int) -> Compute:
    rows = UniformBytes(_codes(1 << bits, ROWS, 96), bits, 24, lookup_loops()["vectors"].vectors)
    x, scales = _numbers(TOKENS, 96), _numbers(4, ROWS)
    return lambda: (rows.multiply(x, scales),)


def _uniform_weight(bits: int) -> Compute:
    codes = UniformCodes(pack(_codes(1 << bits, ROWS, 48), bits), _codes(1 << bits, ROWS, 3), bits, 16, 48)
    scales = _numbers(ROWS, 3)
    return lambda: (dequantize_uniform(codes, scales),)


def _lattice_weight(bits: int) -> Compute:
    packed = _codes(256, ROWS, 6, bits)
    return lambda: (lattice_points(packed, torch.float32),)


def _nearest_entries() -> Compute:
    linear, codebook, norms = _numbers(3, 5, ROWS), _numbers(64, 5), _numbers(3, 64)
    return lambda: (nearest_entries(linear, codebook, norms),)


def _beam(books: int, *, improve: bool) -> Compute:
    linear, codebooks, images, norms = (
        _numbers(8, 99),
        _numbers(books, 32, 8),
        _numbers(books, 8, 32),
        _numbers(books, 32),
    )
    if not improve:
        return lambda: beam_search(linear, codebooks, norms, images, 4)
    start, scales = _codes(32, books, 99).long(), _numbers(99)

    def compute() -> tuple[Tensor, ...]:
        codes, fall = start.clone(), torch.zeros(99)
        return improve_codes(linear, scales, codebooks, norms, images, 4, codes, fall), codes, fall

    return compute


def _near_points(*, best: bool) -> Compute:
    x, metric = _numbers(8, 301), torch.eye(8) + 0.1
    return lambda: e8p_nearest(x, metric, 2) if best else (e8p_candidates(x, 2),)


CASES: dict[str, Callable[[], Compute]] = {
    **{f"gather {k}x8": lambda k=k: _additive(k, 5, backward=False) for k in (1, 2, 3, 4)},
    **{f"rebuild_additive {k}x8": lambda k=k: _additive(k, 8, backward=False) for k in range(1, 6)},
    **{f"scatter {k}x8": lambda k=k: _additive(k, 8, backward=True) for k in (1, 2, 3, 4)},
    "scatter 2x8, groups of 5": lambda: _additive(2, 5, backward=True),
    **{
        f"multiply_additive {k}x8": lambda k=k: _looked_up("vectors", ROWS, (12, k, 256, 8, 1)) for k in (1, 2, 3, 4, 5)
    },
    **{f"lookup {number}": lambda s=shape: _looked_up("floats", ROWS, s) for number, shape in enumerate(TABLES)},
    **{f"lookup_bytes {number}": lambda s=shape: _looked_up("bytes", ROWS, s) for number, shape in enumerate(TABLES)},
    **{f"multiply_lattice {bits}": lambda b=bits: _lattice_bytes(b) for bits in (2, 3, 4)},
    **{f"multiply_uniform {bits}": lambda b=bits: _uniform_bytes(b) for bits in (1, 2, 3, 4, 8)},
    **{f"uniform_weight {bits}": lambda b=bits: _uniform_weight(b) for bits in (2, 3, 4, 8)},
    **{f"rebuild_lattice {bits}": lambda b=bits: _lattice_weight(b) for bits in (2, 3, 4)},
    "nearest_entries": _nearest_entries,
    **{f"search {k}": lambda k=k: _beam(k, improve=False) for k in (1, 2, 3)},
    **{f"improve {k}": lambda k=k: _beam(k, improve=True) for k in (1, 2, 3)},
    "candidates": lambda: _near_points(best=False),
    "nearest": lambda: _near_points(best=True),
}
"""A loop and what is special about a case -> what makes its data and returns the call."""


@pytest.mark.parametrize("case", CASES)
def test_two_threads_give_the_bits_of_one(case: str, assert_race_free: Callable[[Compute], None]) -> None:
    assert_race_free(CASES[case]())


def test_no_loop_is_left_out() -> None:
    """Every function that is public in a module of numba's and has a parallel loop."""
    names = [f"casp_pl.kernels.{module.name}" for module in pkgutil.iter_modules(casp_pl.kernels.__path__)]
    modules = [importlib.import_module(name) for name in names if ".numba_" in name]
    loops = {name for module in modules for name in module.__all__ if callable(getattr(module, name))} - NO_LOOPS
    assert {case.split()[0] for case in CASES} == loops
    assert len(loops) > 10
