"""Compiled loops, where they can run: numba installed and working, float32 on a CPU. Else torch does their work."""

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["compiled_lookup", "compiled_search", "search_path"]

_LOG = logging.getLogger(__name__)


def compiled_search(vectors: Tensor) -> Callable[..., None] | None:
    """The loop of `numba_search` for these vectors, taking tensors; None where torch has to do it."""
    return _load("search") if _is_for_loops(vectors) else None


def compiled_lookup(vectors: Tensor) -> Callable[..., None] | None:
    """The loop of `numba_lookup` for products with these vectors, taking tensors; None where torch has to do it."""
    return _load("lookup") if _is_for_loops(vectors) else None


def search_path() -> str:
    """Which code searches on a CPU, for people: `numba` or `torch`."""
    return "torch" if _load("search") is None else "numba"


def _is_for_loops(vectors: Tensor) -> bool:
    return vectors.device.type == "cpu" and vectors.dtype == torch.float32


def _smallest_arguments(name: str) -> list[Any]:
    """What a loop is tried on: the smallest tensors that it takes."""
    if name == "lookup":
        return [torch.ones(1, 1, 1), torch.zeros(1, 1, dtype=torch.uint8), torch.empty(1, 1)]
    inputs = [torch.ones(*shape) for shape in ((1, 1), (1, 1, 2), (1, 2), (1, 1, 2))]
    return [*inputs, 1, torch.empty(1, 1, dtype=torch.int64), torch.empty(1)]


@cache
def _load(name: str) -> Callable[..., None] | None:
    """Import a loop of numba's and try it once; what is installed need not work."""
    try:
        import numba

        loop: Any = getattr(importlib.import_module(f"casp_pl.kernels.numba_{name}"), name)
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
