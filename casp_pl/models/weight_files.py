"""The safetensors files of a model directory: which tensor lies in which, checked before anything is read."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from casp_pl.errors import InputError, IntegrityError

__all__ = ["checked_weight_map", "has_safetensors", "tensor_files", "weight_file"]

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def has_safetensors(directory: Path) -> bool:
    """Whether a directory holds weights that can be read one by one."""
    return (directory / _INDEX).is_file() or (directory / _SINGLE).is_file()


def tensor_files(directory: Path) -> dict[str, Path]:
    """Name of every tensor as it is stored -> its file.

    Raises:
        InputError: there are no safetensors.
        IntegrityError: a broken file, or an index that names files outside the directory.
    """
    if (directory / _INDEX).is_file():
        try:
            index = json.loads((directory / _INDEX).read_text())
        except ValueError as error:
            raise IntegrityError(f"{directory / _INDEX} is no JSON: {error}.") from error
        files = {name: directory / file for name, file in checked_weight_map(directory / _INDEX, index).items()}
        for file in sorted(set(files.values())):
            with weight_file(file) as reader:
                absent = sorted({name for name in files if files[name] == file} - set(reader.keys()))
            if absent:
                raise IntegrityError(f"{file} does not hold {absent[0]}, which {_INDEX} says lies there.")
        return files
    if not (directory / _SINGLE).is_file():
        raise InputError(f"{directory} holds no {_SINGLE} and no {_INDEX}: its weights cannot be read one by one.")
    with weight_file(directory / _SINGLE) as reader:
        return dict.fromkeys(reader.keys(), directory / _SINGLE)


def checked_weight_map(path: Path, index: Any) -> dict[str, str]:
    """The `weight_map` of an index: tensor name -> name of a file beside the index.

    Raises:
        IntegrityError: there is none, a file is missing, or one lies outside the directory.
    """
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise IntegrityError(f"{path} has no weight_map.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != Path(file).name:
            raise IntegrityError(f"{path}: {name} lies in '{file}', outside the directory: refused.")
        if not (path.parent / file).is_file():
            raise IntegrityError(f"{path}: {name} lies in {file}, which is missing.")
    return weight_map


@contextmanager
def weight_file(path: Path) -> Iterator[Any]:
    """A safetensors file that is read tensor by tensor into memory of its own: nothing of it stays mapped.

    Raises:
        IntegrityError: it is missing or broken.
    """
    try:
        with safe_open(path, framework="pt", backend="pread") as reader:
            yield reader
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path} is no sound safetensors file: {error}.") from error
