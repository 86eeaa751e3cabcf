"""Where activations of whole calibration sets are kept: in memory, or in files that are gone when nobody reads them."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import Tensor

from casp_pl.errors import ResourceError

__all__ = ["ActivationStore", "Keep", "in_memory"]

Keep = Callable[[Tensor], Tensor]


def in_memory(tensor: Tensor) -> Tensor:
    """Keeps a tensor as it is."""
    return tensor


class ActivationStore:
    """Keeps tensors in memory or in memory-mapped files; called with a tensor it gives back an equal one.

    A file has lost its name by the time its tensor is handed out: the disk space is free again as soon as the tensor
    is, also after a kill. Only a kill between the two leaves a `.tmp` file, which the run directory clears away.

    Args:
        mode: `memory`, `disk`, or `auto`: where the tensor lies while more than `reserve` bytes would stay free there.
        directory: where the files are made; on the disk that holds the run, not in TMPDIR.
        reserve: bytes of memory that `auto` leaves to everything else of a process.
        sharing: processes that share the memory of this machine, each with its own reserve; a GPU belongs to one.
    """

    def __init__(
        self, mode: Literal["auto", "memory", "disk"], directory: Path, *, reserve: int = 0, sharing: int = 1
    ) -> None:
        self.mode = mode
        self.directory = directory
        self.reserve = reserve
        self.sharing = sharing
        self.bytes_on_disk = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor, kept.

        Raises:
            ResourceError: the disk is full, or the directory cannot be written.
        """
        if self.mode == "memory" or tensor.numel() == 0:
            return tensor
        if self.mode == "auto" and self._has_room(tensor):
            return tensor
        self.bytes_on_disk += tensor.nbytes
        return self._mapped(tensor)

    def _has_room(self, tensor: Tensor) -> bool:
        """Whether the reserve stays free where the tensor lies; on a CPU with room for one more like it."""
        if tensor.is_cuda:
            kept_for_later = torch.cuda.memory_reserved(tensor.device) - torch.cuda.memory_allocated(tensor.device)
            return torch.cuda.mem_get_info(tensor.device)[0] + kept_for_later > self.reserve
        return psutil.virtual_memory().available - tensor.nbytes > self.reserve * self.sharing

    def _mapped(self, tensor: Tensor) -> Tensor:
        path = self.directory / f".tmp-activations-{secrets.token_hex(8)}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            try:
                # without blocks of its own the file would be found too large for the disk only by a write: SIGBUS
                os.posix_fallocate(descriptor, 0, tensor.nbytes)
                kept = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
            finally:
                os.close(descriptor)
                path.unlink()
        except OSError as error:
            raise ResourceError(
                f"Cannot keep {tensor.nbytes} bytes of activations in {path}: {os.strerror(error.errno or 0)}.\n"
                "Free some space and repeat the command: it goes on from here. Or set activations to memory."
            ) from error
        return kept.view(tensor.shape).copy_(tensor)
