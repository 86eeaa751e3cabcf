"""Reading files that may be broken: hashes, strict JSON, and safetensors with a clear error."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from casp_pl.checkpoint.atomic import METADATA_KEY
from casp_pl.errors import IntegrityError

__all__ = ["read_json", "read_safetensors", "sha256_of"]

_CHUNK = 1 << 20


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        IntegrityError: the file is missing, is no JSON, has a key twice, or holds NaN or infinity.
    """
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise IntegrityError(f"{path} is missing.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}.") from error


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors by name, on the CPU, and the metadata that `write_safetensors` got (None where there is none).

    Raises:
        IntegrityError: the file is missing or is no sound safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            header = (file.metadata() or {}).get(METADATA_KEY)
        return tensors, json.loads(header) if header is not None else None
    except (OSError, SafetensorError, ValueError) as error:
        raise IntegrityError(f"{path} is no sound safetensors file: {error}.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' occurs twice")
    return table


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not allowed in it")
