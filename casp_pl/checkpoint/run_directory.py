"""The directory of one run: artifacts that are complete and unchanged, or absent.

Every write is atomic and then entered in manifest.json. A file without an entry does not count: it is made again. So a
run that was killed anywhere goes on from its last entry.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from casp_pl.checkpoint.atomic import make_directory, remove_leftovers, write_json, write_safetensors
from casp_pl.checkpoint.lock import hold_lock
from casp_pl.checkpoint.manifest import MANIFEST_NAME, Manifest, describe
from casp_pl.checkpoint.reading import read_json, read_safetensors
from casp_pl.errors import ConfigError, IntegrityError, ResourceError
from casp_pl.processes import is_first, of_all, process_rank, said_by_first, wait_for_all

__all__ = ["RunDirectory"]

_LOG = logging.getLogger(__name__)
_LOCK_NAME = ".lock"
_BEFORE_MANIFEST = {_LOCK_NAME, "config.yaml", "tensorboard"}  # what may lie there before the first open


class RunDirectory:
    """Artifacts of a run by name, a relative POSIX path such as `blocks/003.safetensors`.

    Made by `RunDirectory.open` (one run, may write) or `RunDirectory.read_only` (any number). The processes of one run
    open it together and make the same calls: the first one writes, and the others go on when that is done.

    Attributes:
        root: the directory.
    """

    def __init__(self, root: Path, manifest: Manifest, *, writable: bool, together: bool = False) -> None:
        self.root = root
        self._manifest = manifest
        self._writable = writable
        self._together = together

    @staticmethod
    def check_place(path: Path | str) -> None:
        """Find out early whether `open` can write there; nothing is created.

        Raises:
            ResourceError: a file is in the way, or the place cannot be written.
        """
        place = Path(path).absolute()
        try:
            existing = next(folder for folder in (place, *place.parents) if folder.exists())
        except PermissionError as error:
            raise ResourceError(f"Cannot write {path}: {error.strerror}.\nGive another --run_dir.") from error
        if not existing.is_dir():
            raise ResourceError(f"Cannot create {path}: {existing} is a file.\nGive another --run_dir.")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ResourceError(f"Cannot write {path}: {existing} is read-only.\nGive another --run_dir.")

    @classmethod
    @contextmanager
    def open(cls, path: Path | str, fingerprint: Mapping[str, Any]) -> Iterator["RunDirectory"]:
        """Lock the directory, create what is missing, and check that it belongs to the same settings.

        Args:
            path: the run's directory; parents are created.
            fingerprint: JSON object of everything that the artifacts depend on: settings, model, data.

        Raises:
            ResourceError: another process holds the directory, or it cannot be written.
            ConfigError: its artifacts, or another process, have another fingerprint; the message names the key that
                differs.
            IntegrityError: its manifest is missing or broken.
        """
        root, own = Path(path), json.loads(json.dumps(fingerprint, sort_keys=True))
        for rank, other in enumerate(everyones := of_all(own)):
            if (difference := _difference(everyones[0], other, "in the first process", "in that one")) is not None:
                raise ConfigError(
                    f"Process {rank} is at other work. {difference}.\nAll need the same command, model and data."
                )
        if not is_first():
            wait_for_all()
            yield cls(root, Manifest.load(root), writable=False, together=True)
            return
        try:
            make_directory(root)
        except OSError as error:
            raise ResourceError(f"Cannot create {root}: {error.strerror}.\nGive another --run_dir.") from error
        with hold_lock(root / _LOCK_NAME):
            manifest = _load_or_create(root, own)
            _clean(root)
            wait_for_all()
            yield cls(root, manifest, writable=True, together=True)

    @classmethod
    def read_only(cls, path: Path | str) -> "RunDirectory":
        """A run directory to read from, without a lock.

        Raises:
            IntegrityError: it has no sound manifest.
        """
        return cls(Path(path), Manifest.load(Path(path)), writable=False)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the artifacts were made with."""
        return self._manifest.fingerprint

    def path(self, name: str) -> Path:
        """Where an artifact lies; for files that others write, its directory is created."""
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or not inside.parts:
            raise ValueError(f"'{name}' is not a path inside the run directory")
        full = self.root / name
        if self._writable:
            make_directory(full.parent)
        return full

    def has(self, name: str) -> bool:
        """Whether the artifact (a file, or a directory with all its files) is complete and unchanged.

        One that changed since it was recorded is logged, taken out of the manifest, and counts as absent.
        """
        if not self._together:
            return self._has(name)
        return said_by_first(self._has(name) if self._writable else False)

    def _has(self, name: str) -> bool:
        self._refresh()
        entries = self._entries(name)
        for entry in entries:
            problem = self._manifest.artifacts[entry].problem(self.root / entry)
            if problem is not None:
                _LOG.warning("%s %s: it counts as absent", self.root / entry, problem)
                if self._writable:
                    self._forget(name)
                return False
        return bool(entries)

    def forget(self, name: str) -> None:
        """Take an artifact out of the manifest; what lies on disk no longer counts and may be overwritten."""
        self._write(lambda: self._forget(name))

    def _forget(self, name: str) -> None:
        for entry in self._entries(name):
            del self._manifest.artifacts[entry]
        self._manifest.save(self.root)

    def discard(self, name: str) -> None:
        """Delete an artifact that nobody needs any more, and what a killed process left of it; none is no error."""
        self._write(lambda: self._discard(name))

    def _discard(self, name: str) -> None:
        full = self.root / PurePosixPath(name)
        if self._entries(name):
            self._forget(name)
        if full.is_dir():
            shutil.rmtree(full)
        else:
            full.unlink(missing_ok=True)

    def record(self, name: str) -> None:
        """Enter a file, or every file of a directory, that is complete now.

        Raises:
            IntegrityError: there is no such file.
        """
        self._write(lambda: self._record(name))

    def _record(self, name: str) -> None:
        full = self.path(name)
        files = sorted(path for path in full.rglob("*") if path.is_file()) if full.is_dir() else [full]
        if not files or not files[0].exists():
            raise IntegrityError(f"{full} is missing and cannot be recorded.")
        for entry in self._entries(name):
            del self._manifest.artifacts[entry]
        for path in files:
            self._manifest.artifacts[path.relative_to(self.root).as_posix()] = describe(path)
        self._manifest.save(self.root)

    def names(self, folder: str) -> list[str]:
        """The recorded files below a folder, in order."""
        own = sorted(self._entries(folder)) if self._writable or not self._together else []
        return said_by_first(own) if self._together else own

    def write_json(self, name: str, value: Any) -> None:
        """Write and record a JSON artifact.

        Raises:
            ResourceError: the disk is full or cannot be written.
        """
        self._write(lambda: write_json(self.path(name), value), then_record=name)

    def read_json(self, name: str) -> Any:
        """The value of a JSON artifact.

        Raises:
            IntegrityError: it is missing, or is not what was written.
        """
        return read_json(self._checked(name))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Any = None) -> None:
        """Write and record a safetensors artifact with a JSON value beside the tensors.

        Raises:
            ResourceError: the disk is full or cannot be written.
        """
        self._write(lambda: write_safetensors(self.path(name), tensors, metadata), then_record=name)

    def write_tensors_of_each(self, folder: str, tensors: Mapping[str, Tensor], metadata: Any = None) -> None:
        """Every process writes tensors of its own; the folder is recorded when all have done so.

        Raises:
            ResourceError: the disk is full or cannot be written.
        """
        own = self.root / _own_file(folder)
        make_directory(own.parent)
        write_safetensors(own, tensors, metadata)
        wait_for_all()
        self.record(folder)

    def read_tensors_of_each(self, folder: str) -> tuple[dict[str, Tensor], Any]:
        """What this process wrote there with `write_tensors_of_each`.

        Raises:
            IntegrityError: it is missing, or is not what was written.
        """
        return self.read_tensors(_own_file(folder))

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], Any]:
        """Tensors and metadata of a safetensors artifact.

        Raises:
            IntegrityError: it is missing, or is not what was written.
        """
        return read_safetensors(self._checked(name))

    def _entries(self, name: str) -> list[str]:
        return [entry for entry in self._manifest.artifacts if entry == name or entry.startswith(f"{name}/")]

    def _checked(self, name: str) -> Path:
        self._refresh()
        artifact = self._manifest.artifacts.get(name)
        problem = "is not in the manifest" if artifact is None else artifact.problem(self.root / name)
        if problem is not None:
            raise IntegrityError(f"{self.root / name} {problem}.\nRepeat the command that made it: it is made again.")
        return self.root / name

    def _refresh(self) -> None:
        """A reader sees what the writer recorded meanwhile."""
        if not self._writable:
            self._manifest = Manifest.load(self.root)

    def _write(self, work: Callable[[], None], *, then_record: str | None = None) -> None:
        """Done by the first process alone; no other is told that a file is there before it is recorded."""
        if not self._writable and not self._together:
            raise RuntimeError(f"{self.root} was opened for reading only")
        if self._together:
            wait_for_all()  # nobody still reads what is about to be replaced
        if self._writable:
            work()
            if then_record is not None:
                self._record(then_record)
        if self._together:
            wait_for_all()


def _own_file(folder: str) -> str:
    return f"{folder}/{process_rank():03d}.safetensors"


def _load_or_create(root: Path, fingerprint: dict[str, Any]) -> Manifest:
    if not (root / MANIFEST_NAME).exists():
        strangers = sorted(path.name for path in root.iterdir() if path.name not in _BEFORE_MANIFEST)
        strangers = [name for name in strangers if not name.startswith(".tmp")]
        if strangers:
            raise IntegrityError(
                f"{root} has no {MANIFEST_NAME} but holds {', '.join(strangers[:3])}.\n"
                "Give an empty directory, or delete this one to start again."
            )
        manifest = Manifest(fingerprint=fingerprint)
        manifest.save(root)
        return manifest
    manifest = Manifest.load(root)
    if (difference := _difference(manifest.fingerprint, fingerprint, "there", "now")) is not None:
        raise ConfigError(
            f"{root} was made with other settings. {difference}.\nGive another --run_dir, or the settings of this one."
        )
    return manifest


def _difference(one: Mapping[str, Any], other: Mapping[str, Any], where: str, elsewhere: str) -> str | None:
    """The first key in which two fingerprints differ, and how many more do; None where they are alike."""
    before, after = _flat(one), _flat(other)
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key, "absent") != after.get(key, "absent"))
    if not keys:
        return None
    first = keys[0]
    more = f" (and {len(keys) - 1} more: {', '.join(keys[1:4])})" if len(keys) > 1 else ""
    there, here = (_short(flat.get(first, "absent")) for flat in (before, after))
    return f"{first}: {there} {where}, {here} {elsewhere}{more}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat.update(_flat(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _short(value: Any, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _clean(root: Path) -> None:
    removed = remove_leftovers(root)
    for directory in [path for path in root.rglob("*") if path.is_dir()]:
        if directory.is_dir():  # what lay in a leftover is gone with it
            removed += remove_leftovers(directory)
    if removed:
        _LOG.info("%s: removed %s, left by a killed process", root, ", ".join(removed))
