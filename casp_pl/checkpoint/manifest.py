"""The manifest of a directory: SHA-256 and size of every artifact, and the fingerprint of what made them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from casp_pl.checkpoint.atomic import write_json
from casp_pl.checkpoint.reading import read_json, sha256_of
from casp_pl.errors import IntegrityError

__all__ = ["MANIFEST_NAME", "Artifact", "Manifest", "describe"]

MANIFEST_NAME = "manifest.json"

_VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Artifact:
    """What a file must be: `sha256` in hexadecimal and its size in `bytes`."""

    sha256: str
    bytes: int

    def problem(self, path: Path) -> str | None:
        """What is wrong with the file at `path`, or None."""
        if not path.is_file():
            return "is missing"
        size = path.stat().st_size
        if size != self.bytes:
            return f"has {size} bytes instead of {self.bytes}"
        return None if sha256_of(path) == self.sha256 else "has another SHA-256 than when it was written"


@dataclass
class Manifest:
    """Artifacts of a directory by relative POSIX path.

    Attributes:
        fingerprint: JSON object of everything that the artifacts depend on.
        artifacts: relative path to what the file must be.
    """

    fingerprint: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Artifact] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """Read the manifest of a directory.

        Raises:
            IntegrityError: it is missing, broken, or names files outside the directory.
        """
        path = directory / MANIFEST_NAME
        value = read_json(path)
        if not isinstance(value, dict) or set(value) != {"version", "fingerprint", "artifacts"}:
            raise IntegrityError(f"{path} does not have the keys version, fingerprint and artifacts.")
        if value["version"] != _VERSION:
            raise IntegrityError(f"{path} has version {value['version']}; this program reads {_VERSION}.")
        if not isinstance(value["fingerprint"], dict) or not isinstance(value["artifacts"], dict):
            raise IntegrityError(f"{path}: fingerprint and artifacts must be objects.")
        artifacts = {name: _artifact(path, name, entry) for name, entry in value["artifacts"].items()}
        return cls(fingerprint=value["fingerprint"], artifacts=artifacts)

    def save(self, directory: Path) -> None:
        """Write the manifest atomically."""
        artifacts = {name: {"sha256": item.sha256, "bytes": item.bytes} for name, item in self.artifacts.items()}
        value = {"version": _VERSION, "fingerprint": self.fingerprint, "artifacts": artifacts}
        write_json(directory / MANIFEST_NAME, value)

    def problems(self, directory: Path) -> dict[str, str]:
        """Relative path to what is wrong with it, for every artifact that is not what it was."""
        found = {name: artifact.problem(directory / name) for name, artifact in self.artifacts.items()}
        return {name: problem for name, problem in found.items() if problem is not None}


def describe(path: Path) -> Artifact:
    """SHA-256 and size of a file as it is now."""
    return Artifact(sha256=sha256_of(path), bytes=path.stat().st_size)


def _artifact(manifest: Path, name: str, entry: Any) -> Artifact:
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts or not inside.parts:
        raise IntegrityError(f"{manifest} names '{name}', which lies outside the directory.")
    if not isinstance(entry, Mapping) or set(entry) != {"sha256", "bytes"}:
        raise IntegrityError(f"{manifest}: the entry of {name} does not have the keys sha256 and bytes.")
    sha256, size = entry["sha256"], entry["bytes"]
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256) or type(size) is not int or size < 0:
        raise IntegrityError(f"{manifest}: the entry of {name} is no SHA-256 and size.")
    return Artifact(sha256=sha256, bytes=size)
