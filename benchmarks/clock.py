"""Times, and the rates of the machine.

Contenders that are compared take turns, so that what slows the machine for a while slows all of them.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from casp_pl.linalg import full_width_matmul

__all__ = ["bandwidth", "gemm_rate", "medians", "timed"]

Result = TypeVar("Result")
Clock = Callable[[], float]


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """What a function returns, and its CPU seconds."""
    start = time.process_time()
    return work(), time.process_time() - start


def medians(
    contenders: Mapping[str, Sequence[Callable[[], object]]], repeats: int, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Median seconds of one call of every contender.

    Args:
        contenders: the same work on one set of data or on several in turn; several keep data out of the caches.
        repeats: calls of each.
        clock: that tells seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for calls in contenders.values():  # compiles, allocates
        for call in calls:
            call()
    for turn in range(repeats):
        for name, calls in contenders.items():
            start = clock()
            calls[turn % len(calls)]()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def bandwidth() -> float:
    """Bytes a second that the present number of threads reads from memory."""
    data = torch.ones(1 << 26)
    return 4 * data.numel() / medians({"read": [data.sum]}, 9)["read"]


def gemm_rate(size: int = 2048, dtype: torch.dtype = torch.float32, clock: Clock = time.perf_counter) -> float:
    """Operations a second, of `clock`, of a product of square matrices, by the present number of threads.

    Of torch's two libraries the faster one counts, see `full_width_products`.
    """
    left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    ways: dict[str, list[Callable[[], Any]]] = {
        "as torch chooses": [lambda: left @ right],
        "at full width": [lambda: full_width_matmul(left, right)],
    }
    return 2 * size**3 / min(medians(ways, 9, clock).values())
