"""Compiled loops, where they can run: numba installed and working, float32 on a CPU. Else torch does their work."""

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["LookupLoop", "compiled_search", "lookup_loop", "lookup_loops", "search_path"]

_LOG = logging.getLogger(__name__)
_VBMI = "avx512vbmi"


class LookupLoop(NamedTuple):
    """A loop that multiplies by looking products up, and the layout of codes that it reads.

    Attributes:
        run: `numba_lookup.lookup` or one with the same arguments, taking tensors.
        arrange: codes uint8 (O, M) -> the layout that `run` takes for them.
        tokens: up to how many the loop is faster than dequantizing a weight and multiplying with it.
    """

    run: Callable[..., None]
    arrange: Callable[[Tensor], Tensor]
    tokens: int


def compiled_search(vectors: Tensor) -> Callable[..., None] | None:
    """The loop of `numba_search` for these vectors, taking tensors; None where torch has to do it."""
    fits = vectors.device.type == "cpu" and vectors.dtype == torch.float32
    return _load("search", "search") if fits else None


def lookup_loop() -> LookupLoop | None:
    """The fastest loop of this machine for products with codes on a CPU; None where torch has to do it."""
    return next(iter(lookup_loops().values()), None)


@cache
def lookup_loops() -> dict[str, LookupLoop]:
    """All loops of this machine by name, `bytes` and `floats`, the fastest first."""
    loops: dict[str, LookupLoop] = {}
    if (run := _load("lookup", "lookup")) is None:
        return loops
    if _has_byte_tables() and (run_bytes := _load("bytes", "lookup_bytes")) is not None:
        loops["bytes"] = LookupLoop(run_bytes, _tiles, tokens=16)
    loops["floats"] = LookupLoop(run, lambda codes: codes, tokens=2)
    return loops


def search_path() -> str:
    """Which code searches on a CPU, for people: `numba` or `torch`."""
    return "torch" if _load("search", "search") is None else "numba"


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


def _smallest_arguments(name: str) -> list[Any]:
    """What a loop is tried on: the smallest tensors that it takes."""
    if name == "search":
        inputs = [torch.ones(*shape) for shape in ((1, 1), (1, 1, 2), (1, 2), (1, 1, 2))]
        return [*inputs, 1, torch.empty(1, 1, dtype=torch.int64), torch.empty(1)]
    codes = torch.zeros(1, 1, dtype=torch.uint8)
    return [torch.ones(1, 1, 1), torch.ones(1, 1, 1), codes if name == "lookup" else _tiles(codes),
            torch.ones(1, 1), 1, torch.empty(1, 1)]  # fmt: skip


@cache
def _load(module: str, name: str) -> Callable[..., None] | None:
    """Import a loop of numba's and try it once; what is installed need not work."""
    try:
        import numba

        loop: Any = getattr(importlib.import_module(f"casp_pl.kernels.numba_{module}"), name)
        loop(*_arrays(*_smallest_arguments(name)))
    except Exception as error:  # an optional package fails in its own ways: a missing library, no place for its cache
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        _LOG.info("code %s is done by torch, which takes longer: numba does not run here (%s)", name, reason)
        return None
    config: Any = numba.config
    most = config.NUMBA_NUM_THREADS

    def run(*arguments: Any) -> None:
        numba.set_num_threads(min(most, torch.get_num_threads()))
        loop(*_arrays(*arguments))

    return run


def _arrays(*arguments: Any) -> list[Any]:
    """Tensors as contiguous arrays (one layout, so that one compilation serves all calls), the rest as it is."""
    return [item.detach().contiguous().numpy() if isinstance(item, Tensor) else item for item in arguments]
