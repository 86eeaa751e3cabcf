"""Compiled code, where it can run: numba's loops on a CPU in float32, Triton's kernels on a GPU. Else torch does it."""

import importlib
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "AdditiveLoops",
    "LatticeLoops",
    "LookupLoop",
    "SearchLoops",
    "VectorLoops",
    "WeightLoops",
    "additive_loops",
    "backend_name",
    "gather_loop",
    "lattice_loops",
    "lookup_loop",
    "lookup_loops",
    "search_loops",
    "weight_loops",
]

_LOG = logging.getLogger(__name__)
_VBMI = "avx512vbmi"
_VECTOR = 8


class VectorLoops(NamedTuple):
    """The loops of `numba_vectors` for codes in the layouts in which they are stored, taking tensors.

    Attributes:
        lattice: `multiply_lattice`.
        uniform: `multiply_uniform`.
        least_rows: that they take, in groups of 8.
        others: what looks products up for fewer rows and for groups of other lengths.
    """

    lattice: Callable[..., None]
    uniform: Callable[..., None]
    least_rows: int
    others: "LookupLoop"

    def take(self, length: int, rows: int) -> bool:
        """Whether these loops decode so many rows in groups of this length."""
        return length == _VECTOR and rows >= self.least_rows


class LookupLoop(NamedTuple):
    """Code that multiplies with codes, and the layout of codes that it reads.

    Attributes:
        run: (x, codebooks, codes, weights, span, sums) as `triton_lookup.lookup` takes them, but codes arranged.
        arrange: codes uint8 (O, M) -> the layout that `run` takes for them.
        tokens: up to how many this is faster than dequantizing a weight and multiplying with it.
        vectors: what decodes lattice codes and whole numbers instead, where that is faster than `run`.
    """

    run: Callable[..., None]
    arrange: Callable[[Tensor], Tensor]
    tokens: int
    vectors: VectorLoops | None = None

    def taking(self, length: int, rows: int) -> "LookupLoop":
        """The loop that runs for so many rows in groups of this length: this one, or others of fewer tokens."""
        return self if self.vectors is None or self.vectors.take(length, rows) else self.vectors.others


class AdditiveLoops(NamedTuple):
    """The loops of `numba_additive`, taking tensors; `gather` is that of `numba_vectors` for groups of 8."""

    gather: Callable[..., None]
    scatter: Callable[..., None]


class WeightLoops(NamedTuple):
    """`numba_dequantize.uniform_weight`, which reads so many bytes ahead, and `numba_vectors.rebuild_lattice`."""

    uniform: Callable[..., None]
    lattice: Callable[..., None]
    ahead: int


class SearchLoops(NamedTuple):
    """The loops of `numba_search`, taking tensors."""

    nearest_entries: Callable[..., None]
    search: Callable[..., None]
    improve: Callable[..., None]


class LatticeLoops(NamedTuple):
    """The loops of `numba_lattice`, taking tensors."""

    candidates: Callable[..., None]
    nearest: Callable[..., None]


def search_loops(vectors: Tensor) -> SearchLoops | None:
    """The loops that search codebooks for vectors like these; None where torch has to do it."""
    if not _fits(vectors):
        return None
    nearest, search, improve = (_load("search", name, _as_they_are) for name in SearchLoops._fields)
    return None if nearest is None or search is None or improve is None else SearchLoops(nearest, search, improve)


def additive_loops(tensor: Tensor) -> AdditiveLoops | None:
    """The loops for additive weights like this tensor; None where torch has to do it."""
    if not _fits(tensor):
        return None
    gather, scatter = _load("additive", "gather"), _load("additive", "scatter")
    eights = _load("vectors", "rebuild_additive", _as_they_are)
    if gather is None or scatter is None or eights is None:
        return None

    def either(codes: Tensor, codebooks: Tensor, scales: Tensor, weight: Tensor) -> None:
        (eights if codebooks.shape[2] == _VECTOR else gather)(codes, codebooks, scales, weight)

    return AdditiveLoops(either, scatter)


def gather_loop(tensor: Tensor) -> Callable[..., None] | None:
    """What rebuilds additive weights like this tensor, on a GPU too; None where torch has to do it."""
    if tensor.device.type == "cuda" and tensor.dtype == torch.float32:
        return None if (kernels := _triton()) is None else kernels.gather
    loops = additive_loops(tensor)
    return None if loops is None else loops.gather


def lattice_loops(vectors: Tensor) -> LatticeLoops | None:
    """The loops that find points of E8P near vectors like these; None where torch has to do it."""
    if not _fits(vectors):
        return None
    candidates, nearest = _load("lattice", "candidates"), _load("lattice", "nearest")
    return None if candidates is None or nearest is None else LatticeLoops(candidates, nearest)


def weight_loops(device: torch.device, dtype: torch.dtype) -> WeightLoops | None:
    """The loops that write rows of a weight from packed codes, in float32; None where torch has to do it."""
    if device.type != "cpu" or dtype == torch.float64 or torch.compiler.is_compiling():
        return None
    uniform, lattice = _load("dequantize", "uniform_weight"), _load("vectors", "rebuild_lattice", _as_they_are)
    if uniform is None or lattice is None:
        return None
    from casp_pl.kernels.numba_dequantize import AHEAD

    return WeightLoops(uniform, lattice, AHEAD)


def lookup_loop(device: torch.device) -> LookupLoop | None:
    """The fastest code of this machine for products with codes on a device; None where torch has to do it."""
    if device.type == "cuda":
        return None if (kernels := _triton()) is None else kernels.look_up
    return next(iter(lookup_loops().values()), None) if device.type == "cpu" else None


def backend_name(device: torch.device) -> str:
    """What works with codes on a device, for people: `numba 0.67.0 (vectors)`; `torch` where nothing faster runs.

    In brackets is the first of `lookup_loops`. A loop that does not run while others do is told when it is tried.
    """
    if lookup_loop(device) is None:
        return "torch"
    if device.type == "cuda":
        return f"Triton {_version('triton')} for few tokens and weights of AQLM, torch for all else"
    return f"numba {_version('numba')} ({next(iter(lookup_loops()))})"


def _version(package: str) -> str:
    # what metadata says of triton differs between builds of torch
    return str(importlib.import_module(package).__version__)


@cache
def lookup_loops() -> dict[str, LookupLoop]:
    """All loops of this machine's CPU by name, `bytes`, `vectors` and `floats`, the fastest first."""
    loops: dict[str, LookupLoop] = {}
    if (run := _load("lookup", "lookup", _as_they_are)) is None:
        return loops
    floats = LookupLoop(_by_input(run), _laid_out, tokens=2)
    if _has_byte_tables() and (run_bytes := _load("bytes", "lookup_bytes", _as_they_are)) is not None:
        loops["bytes"] = LookupLoop(_telling_infinity(_by_input(run_bytes)), _tiles, tokens=16)
    if (vectors := _vector_loop(floats)) is not None:
        loops["vectors"] = vectors
    loops["floats"] = floats
    return loops


def _vector_loop(floats: LookupLoop) -> LookupLoop | None:
    """`numba_vectors`, and the look-up of single products for the groups that it does not take."""
    loops = [_load("vectors", f"multiply_{kind}", _as_they_are) for kind in ("additive", "lattice", "uniform")]
    additive, lattice, uniform = loops
    if additive is None or lattice is None or uniform is None:
        return None
    from casp_pl.kernels.numba_vectors import LEAST_ROWS

    vectors = VectorLoops(lattice, uniform, LEAST_ROWS, floats)

    def run(x: Tensor, codebooks: Tensor, codes: Tensor, weights: Tensor, span: int, sums: Tensor) -> None:
        fits = vectors.take(codebooks.shape[2], len(codes)) and span % len(codebooks) == 0
        (additive if fits else floats.run)(x, codebooks, codes, weights, span, sums)

    return LookupLoop(run, _laid_out, tokens=16, vectors=vectors)


class _Kernels(NamedTuple):
    """Those of `triton_lookup`; `gather` has the arguments of `numba_additive.gather`."""

    look_up: LookupLoop
    gather: Callable[..., None]


@cache
def _triton() -> _Kernels | None:
    """The kernels, tried once."""
    try:
        from casp_pl.kernels.triton_lookup import gather, lookup

        ones = torch.ones(1, 1, 1, dtype=torch.float32, device="cuda")
        codes = torch.zeros(1, 1, 1, dtype=torch.uint8, device="cuda")
        lookup(ones, ones, codes[0], ones[0], 1, torch.empty_like(ones[0]))
        gather(codes, ones, ones[0, 0], torch.empty_like(ones[0]))
    except Exception as error:  # Triton may be missing, or its compiler, or may not know this GPU
        _LOG.info("work on codes is done by torch, which takes longer: Triton does not run here (%s)", _reason(error))
        return None
    return _Kernels(LookupLoop(lookup, _laid_out, tokens=8), gather)  # not measured on a GPU


def _by_input(run: Callable[..., None]) -> Callable[..., None]:
    """Numba's loops walk over all entries input by input and take codebooks as (K, D, C)."""

    def transposed(x: Tensor, codebooks: Tensor, *rest: Any) -> None:
        run(x, codebooks.transpose(1, 2), *rest)

    return transposed


def _telling_infinity(run: Callable[..., None]) -> Callable[..., None]:
    """NaN for tokens that are not finite, where a loop would hide them."""

    def told(x: Tensor, *rest: Any) -> None:
        run(x, *rest)
        rest[-1].add_((x * 0).sum(dim=(1, 2)).unsqueeze(1))

    return told


def _laid_out(codes: Tensor) -> Tensor:
    return codes.contiguous()


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _fits(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def _tiles(codes: Tensor) -> Tensor:
    from casp_pl.kernels.numba_bytes import tiles_of

    return torch.from_numpy(tiles_of(codes.numpy()))


def _has_byte_tables() -> bool:
    """Whether numba compiles for a CPU with AVX-512 VBMI. LLVM ends the process where it is asked for it in vain."""
    from llvmlite import binding
    from numba import config

    configured: Any = config
    if configured.CPU_NAME or configured.CPU_FEATURES:
        return f"+{_VBMI}" in (configured.CPU_FEATURES or "")
    return bool(binding.get_host_cpu_features().get(_VBMI, False))


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float32, device="cpu")


def _zeros(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="cpu")


def _smallest_arguments(name: str) -> list[Any]:
    """What a loop is tried on: the smallest tensors that it takes, whatever torch's defaults are at the time."""
    if name in SearchLoops._fields:
        table, number, code = _ones(1, 1, 2), _ones(1), _zeros(1, 1, dtype=torch.int64)
        if name == "nearest_entries":
            return [_ones(1, 1, 1), table[0], table[0], code]
        tables = [table, table[0], table, 1, code]
        if name == "search":
            return [number[None], *tables, number]
        return [number[None], number, *tables, number[None], number]
    if name in ("gather", "scatter"):
        tables = [_zeros(1, 1, 1), _ones(1, 1, 1), _ones(1), _ones(1, 1)]
        return tables if name == "gather" else [*tables, torch.arange(2, device="cpu"), _ones(1, 1, 1, 1), _ones(1)]
    if name in ("candidates", "nearest"):
        patterns = [_ones(8, 1), _ones(1), _ones(1), _zeros(1, dtype=torch.int64)]
        if name == "candidates":
            return [_ones(8, 1), *patterns, 1, _zeros(2, 1, dtype=torch.int64)]
        return [_ones(8, 1), _ones(8, 8), *patterns, 1, _zeros(1, dtype=torch.int64), _ones(8, 1)]
    if name == "uniform_weight":
        return [_zeros(9), 1, _ones(1, 1), _ones(1, 1), 8, _ones(1, 8)]
    if name.startswith("rebuild"):
        books = _ones(2, 1, 8) if name == "rebuild_additive" else _ones(2 * 256 * 8 + 256)
        return [_zeros(1, 1, 2), books, _ones(1), _ones(1, 8)]
    if name.startswith("multiply"):
        x, scales, sums = _ones(1, 1, 8), _ones(1, 4), _ones(1, 4)
        codes = _zeros(4, 1, 2)
        if name == "multiply_additive":
            return [x, _ones(2, 1, 8), codes[:, 0], scales, 2, sums]
        if name == "multiply_lattice":
            return [x, _ones(2 * 256 * 8 + 256), codes, scales, sums]
        return [x, 2, _zeros(12), scales, 1, sums]
    codes = _zeros(1, 1) if name == "lookup" else _tiles(_zeros(1, 1))
    return [_ones(1, 1, 1), _ones(1, 1, 1), codes, _ones(1, 1), 1, _ones(1, 1)]


@cache
def _numba() -> Any:
    """The package, or None; asked once, so that one line tells of all loops at once."""
    try:
        return importlib.import_module("numba")
    except Exception as error:  # a broken installation raises whatever it likes
        _LOG.info("work on codes is done by torch, which takes longer: numba does not run here (%s)", _reason(error))
        return None


def _arrays(*arguments: Any) -> list[Any]:
    """Tensors as contiguous arrays (one layout, so that one compilation serves all calls), the rest as it is.

    `Tensor.numpy` would fix the size of its memory for ever, and FSDP takes that of gathered parameters away.

    Raises:
        TypeError: floats that are not float32: numba would compile the loop once more, for them.
    """
    import numpy as np

    for item in arguments:
        if isinstance(item, Tensor) and item.is_floating_point() and item.dtype != torch.float32:
            raise TypeError(f"compiled loops compute in torch.float32, not {item.dtype}")
    return [np.from_dlpack(item.detach().contiguous()) if isinstance(item, Tensor) else item for item in arguments]


def _as_they_are(*arguments: Any) -> tuple[Any, ...]:
    return arguments


@cache
def _load(module: str, name: str, converted: Callable[..., Sequence[Any]] = _arrays) -> Callable[..., None] | None:
    """Import a loop of numba's and try it once; what is installed need not work.

    Args:
        module: what follows `numba_` in its module's name.
        name: of the loop.
        converted: makes what the loop takes of tensors and numbers.
    """
    if (numba := _numba()) is None:
        return None
    threads = torch.get_num_threads()
    try:
        loop: Any = getattr(importlib.import_module(f"casp_pl.kernels.numba_{module}"), name)
        loop(*converted(*_smallest_arguments(name)))
    except Exception as error:  # an optional package fails in its own ways: a missing library, no place for its cache
        _LOG.info("code %s is done by torch, which takes longer: numba does not run here (%s)", name, _reason(error))
        return None
    finally:  # numba's first loop sets OpenMP's number of threads for all, whatever OMP_NUM_THREADS says
        torch.set_num_threads(threads)
    most = numba.config.NUMBA_NUM_THREADS

    def run(*arguments: Any) -> None:
        numba.set_num_threads(min(most, torch.get_num_threads()))
        loop(*converted(*arguments))

    return run
