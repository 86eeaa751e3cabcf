"""The compiled search, where it can run: numba installed and working, float32 on a CPU. Else torch does its work."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["compiled_search", "search_path"]

_LOG = logging.getLogger(__name__)


def compiled_search(vectors: Tensor) -> Callable[..., None] | None:
    """The loop of `numba_search` for these vectors, taking tensors; None where torch has to do it."""
    if vectors.device.type != "cpu" or vectors.dtype != torch.float32:
        return None
    return _load()


def search_path() -> str:
    """Which code searches on a CPU, for people: `numba` or `torch`."""
    return "torch" if _load() is None else "numba"


@cache
def _load() -> Callable[..., None] | None:
    """Import numba's loop and try it once; what is installed need not work."""
    try:
        import numba

        from casp_pl.kernels import numba_search

        search: Any = numba_search.search  # a Dispatcher, whose type says nothing of its arguments
        probe = [torch.ones(*shape) for shape in ((1, 1), (1, 1, 2), (1, 2), (1, 1, 2))]
        results = torch.empty(1, 1, dtype=torch.int64), torch.empty(1)
        search(*_arrays(*probe), 1, *_arrays(*results))
    except Exception as error:  # an optional package fails in its own ways: a missing library, no place for its cache
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        _LOG.info("codes are searched by torch, which takes longer: numba does not run here (%s)", reason)
        return None
    config: Any = numba.config
    most = config.NUMBA_NUM_THREADS

    def run(*arguments: Any) -> None:
        numba.set_num_threads(min(most, torch.get_num_threads()))
        search(*_arrays(*arguments))

    return run


def _arrays(*arguments: Any) -> list[Any]:
    """Tensors as contiguous arrays (one layout, so that one compilation serves all calls), the rest as it is."""
    return [item.detach().contiguous().numpy() if isinstance(item, Tensor) else item for item in arguments]
