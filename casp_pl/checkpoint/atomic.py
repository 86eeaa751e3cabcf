"""Files that are either absent or complete: written beside their place, synced, renamed.

A killed process leaves at most a file whose name begins with `.tmp` in the directory of the file that it wrote;
`remove_leftovers` deletes those. Nothing goes through TMPDIR, which may lie on another file system.
"""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from casp_pl.errors import ResourceError

__all__ = [
    "METADATA_KEY",
    "atomic_path",
    "is_disk_full",
    "make_directory",
    "remove_leftovers",
    "resource_error",
    "sync_directory",
    "temporary_path",
    "write_bytes",
    "write_json",
    "write_safetensors",
    "write_text",
]

METADATA_KEY = "casp"  # one entry, because safetensors writes several in an order that changes from run to run

_PREFIX = ".tmp-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically.

    Raises:
        ResourceError: the disk is full or the place cannot be written.
    """
    with atomic_path(path, expected_bytes=len(data)) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON with sorted keys atomically; see `write_bytes`. NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Any = None) -> None:
    """Write tensors and a JSON value as one safetensors file atomically; the same input gives the same bytes.

    Args:
        path: where to.
        tensors: name to tensor, on any device.
        metadata: any JSON value; `read_tensors` of a run directory gives it back.

    Raises:
        ResourceError: the disk is full or the place cannot be written.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {METADATA_KEY: json.dumps(metadata, sort_keys=True, allow_nan=False)}
    with atomic_path(path, expected_bytes=sum(tensor.nbytes for tensor in ready.values())) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # save_file replaces the file by one that only its owner may read
        save_file(ready, temporary, metadata=header)
        temporary.chmod(mode)


@contextmanager
def atomic_path(path: Path, *, expected_bytes: int = 0) -> Iterator[Path]:
    """Give a temporary path beside `path`; what lies there at the end becomes `path`, and nothing does after an error.

    Args:
        path: the final name.
        expected_bytes: about how much will be written, for the message on a full disk.

    Raises:
        ResourceError: the disk is full or the place cannot be written.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except (OSError, SafetensorError) as error:
        raise resource_error(error, path, expected_bytes) from error
    finally:
        with suppress(OSError):  # it became `path`, or was never made
            temporary.unlink()


def temporary_path(path: Path) -> Path:
    """A fresh name beside `path` that `remove_leftovers` knows."""
    return path.with_name(f"{_PREFIX}{path.name}-{secrets.token_hex(4)}")


def remove_leftovers(directory: Path, name: str = "") -> list[str]:
    """Delete what killed processes left in a directory, not below it, and return the names.

    Args:
        directory: a directory that only this program writes to, or any with a `name`.
        name: delete only the leftovers of this file or directory.
    """
    pattern = rf"{re.escape(_PREFIX + name)}-[0-9a-f]{{8}}" if name else r"\.tmp.*"  # safetensors' own are .tmpXXXXXX
    found = sorted(path for path in directory.iterdir() if re.fullmatch(pattern, path.name))
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in found]


def make_directory(directory: Path) -> None:
    """Make a directory and the parents that are missing, so that they survive a power cut."""
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_directory(folder.parent)


def sync_directory(directory: Path) -> None:
    """Make renames in a directory, and new directories there, survive a power cut."""
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: OSError | SafetensorError) -> bool:
    """Whether a write failed for want of space (the disk, a quota, or the largest size of a file)."""
    code = error.errno if isinstance(error, OSError) else None
    return code in _FULL or any(f"os error {number})" in str(error) for number in _FULL)


def resource_error(error: OSError | SafetensorError, path: Path, expected_bytes: int | None = None) -> ResourceError:
    """A failed write in the user's words: what could not be written, how much it was, and the way out."""
    code = error.errno if isinstance(error, OSError) else None
    reason = os.strerror(code) if code is not None else str(error)
    if is_disk_full(error):
        size = "" if expected_bytes is None else f" ({expected_bytes} bytes)"
        message = f"No space left for {path}{size}."
        return ResourceError(f"{message}\nFree some and repeat the command: it goes on from here.")
    return ResourceError(f"Cannot write {path}: {reason}.\nGive a directory that can be written.")
