"""A directory that is absent or complete: filled beside its place, sealed with hashes, then renamed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from casp_pl.checkpoint.atomic import make_directory, remove_leftovers, resource_error, sync_directory, temporary_path
from casp_pl.checkpoint.manifest import Manifest, describe
from casp_pl.checkpoint.model_directory import CONFIG_NAME, is_compressed_model
from casp_pl.errors import ResourceError

__all__ = ["require_new", "write_directory"]


def write_directory(out_dir: Path | str, fill: Callable[[Path], None], *, size: int) -> None:
    """Write a model directory with a manifest of its hashes.

    Args:
        out_dir: the directory; an older compressed model there is replaced.
        fill: writes all files into the directory that it is given.
        size: bytes that are about to be written, for the message where the disk is full.

    Raises:
        ResourceError: the disk is full, the place cannot be written, or something else lies there.
    """
    target = Path(out_dir)
    _check_target(target)
    temporary = temporary_path(target)
    try:
        make_directory(target.parent)
        remove_leftovers(target.parent, target.name)
        temporary.mkdir()
        fill(temporary)
        _seal(temporary)
        _put_in_place(temporary, target)
    except (OSError, SafetensorError) as error:
        raise resource_error(error, target, size) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_new(directory: Path | str) -> None:
    """Nothing may lie there but an empty directory.

    Raises:
        ResourceError: something does.
    """
    path = Path(directory)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ResourceError(f"{path} exists: it is not overwritten.\nGive another place, or remove it first.")


def _check_target(target: Path) -> None:
    if not (target.is_dir() and is_compressed_model(target)):
        require_new(target)


def _seal(directory: Path) -> None:
    """Sync every file and write the manifest of their hashes."""
    mode = (directory / CONFIG_NAME).stat().st_mode  # safetensors makes files that only their owner may read
    manifest = Manifest()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        manifest.artifacts[path.relative_to(directory).as_posix()] = describe(path)
    manifest.save(directory)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename; a model that is already there steps aside first, so that `target` never holds half of each."""
    old = temporary_path(target)
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        if old.exists():
            os.rename(old, target)
        raise
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)
