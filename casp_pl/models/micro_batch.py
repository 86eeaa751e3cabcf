"""Fewer samples at a time where memory is short.

A block treats each sample by itself, so halves of a batch give what the whole gives, up to the rounding of sums.
"""

import logging
from collections.abc import Callable
from typing import Protocol, Self, TypeVar

import torch

from casp_pl.errors import ResourceError

__all__ = ["Divisible", "in_halves", "is_out_of_memory"]

_LOG = logging.getLogger(__name__)
_CPU_REFUSALS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


class Divisible(Protocol):
    """A batch of samples."""

    def __len__(self) -> int:
        """How many."""

    def halves(self) -> tuple[Self, Self]:
        """The first half of the samples and the rest."""


BatchT = TypeVar("BatchT", bound=Divisible)
T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator has refused: Python's, a device's, or torch's on the CPU, which has no class for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(refusal in str(error) for refusal in _CPU_REFUSALS)


def in_halves(work: Callable[[BatchT], T], batch: BatchT, join: Callable[[list[T]], T]) -> T:
    """`work(batch)`; where memory does not suffice, what `join` makes of its halves, of their halves, and so on.

    Raises:
        ResourceError: one sample is too much.
    """
    try:
        return work(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(batch) < 2:
            raise ResourceError(
                "Out of memory inside a block with a single sample.\n"
                "Lower data.max_length, data.text_length or data.samples, or take a device with more memory."
            ) from error
    _LOG.warning("Out of memory inside a block with %d samples: half of them at a time", len(batch))
    return join([in_halves(work, half, join) for half in batch.halves()])
