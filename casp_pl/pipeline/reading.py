"""How fast the files of a model are read on this machine."""

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from casp_pl.models.weight_files import tensor_files, weight_file
from casp_pl.pipeline.planning import Reads

__all__ = ["ReadCosts", "measured_read_costs", "reading_seconds"]

_ENOUGH = 256 << 20  # bytes that are read to know


@dataclass(frozen=True)
class ReadCosts:
    """Seconds a stored byte.

    Attributes:
        first: from the disk, the file dropped from the system's cache before, and converted to the computing dtype.
        again: out of that cache, converted likewise.
        measured: bytes that were read to know.
    """

    first: float
    again: float
    measured: int

    @property
    def source(self) -> str:
        """Where the figures come from, for the reader."""
        return (
            f"{self.measured >> 20} MiB of the model's files read here, {1e-6 / self.first:,.0f} MB/s from disk,"
            f" {1e-6 / self.again:,.0f} MB/s out of the file cache"
        )


def measured_read_costs(directory: Path, dtype: torch.dtype) -> ReadCosts | None:
    """Read some tensors as a streamed run does, twice; their values are not looked at. None where no file is here.

    Where the system cannot be asked to forget a file (it has no posix_fadvise), `first` is that of the cache too.
    """
    if not any(directory.glob("*.safetensors")):
        return None
    largest_first = sorted(tensor_files(directory).items(), key=lambda entry: (-entry[1].stat().st_size, *entry))
    _forget(largest_first[0][1])
    (first, count), (again, _) = (_read(largest_first, dtype) for _ in range(2))
    return ReadCosts(first / count, again / count, count)


def reading_seconds(
    reads: Mapping[str, Reads],
    computing: Mapping[str, float],
    costs: ReadCosts,
    *,
    original_bytes: int,
    compressed_bytes: int,
    dense: float,
    cached: bool,
) -> dict[str, float]:
    """Seconds by stage beyond computing: while a block is in use, the next is read into the file cache.

    Args:
        reads: how often a stage reads the blocks.
        computing: seconds by stage.
        costs: of a byte.
        original_bytes: of the original's blocks in their files.
        compressed_bytes: of all compressed blocks.
        dense: seconds to make them all dense.
        cached: whether the files stay in the file cache, beside all that the run holds. Loading the model has read
            them then.
    """
    seconds = {}
    for stage, times in reads.items():
        waiting = times.original * original_bytes * (costs.first - costs.again) - computing[stage]
        copied = (times.original * original_bytes + times.compressed * compressed_bytes) * costs.again
        seconds[stage] = copied + times.dense * dense + (0.0 if cached else max(0.0, waiting))
    return seconds


def _read(tensors: Iterable[tuple[str, Path]], dtype: torch.dtype) -> tuple[float, int]:
    """Seconds for the first `_ENOUGH` bytes of these tensors, and how many they were."""
    start, total = time.perf_counter(), 0
    for name, file in tensors:
        with weight_file(file) as reader:
            tensor = reader.get_tensor(name)
        total += tensor.nbytes
        tensor.to(dtype)
        if total >= _ENOUGH:
            break
    return time.perf_counter() - start, total


def _forget(file: Path) -> None:
    """Ask the system to drop what it holds of a file; what has not been written to the disk yet stays."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
