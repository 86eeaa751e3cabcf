"""What a model's directory must be before a weight in it is read: JSON and safetensors, nothing outside, no pickles."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from casp_pl.errors import InputError, IntegrityError

__all__ = [
    "CONFIG_NAME",
    "PICKLES",
    "check_header",
    "check_index",
    "check_original",
    "check_weight_files",
    "read_json",
    "say_own_code_is_ignored",
]

CONFIG_NAME = "config.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".msgpack")
_LOG = logging.getLogger(__name__)


def check_original(directory: Path) -> None:
    """Refuse the directory of a model to compress if it is unsafe to read. Pickles beside safetensors are not read.

    Raises:
        InputError: there is no config or no weight, or the model is quantized already.
        IntegrityError: a broken config or header, weights that are pickles only, an index that points outside.
    """
    if not (directory / CONFIG_NAME).is_file():
        raise InputError(f"model.source: {directory} holds no model (no {CONFIG_NAME}).")
    config = read_json(directory / CONFIG_NAME)
    say_own_code_is_ignored(directory, config)
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise InputError(f"model.source: {directory} is quantized already ({method}): give the original model.")
    for index in sorted(directory.glob("*.safetensors.index.json")):
        check_index(index)
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        pickles = [path for path in sorted(directory.iterdir()) if path.suffix in PICKLES]
        if pickles:
            check_weight_files(directory, pickles)
        raise InputError(f"model.source: {directory} holds no weights (no .safetensors file).")
    for path in weights:
        check_header(path)


def say_own_code_is_ignored(directory: Path, config: Any) -> None:
    """A warning if a config names code that comes with the model: it is never run."""
    if isinstance(config, dict) and "auto_map" in config:
        _LOG.warning("%s asks for code of its own (auto_map): ignored", directory / CONFIG_NAME)


def check_weight_files(directory: Path, files: Sequence[Path | str]) -> None:
    """Refuse weight files that are pickles or lie outside the directory.

    Raises:
        IntegrityError: the message names the file.
    """
    inside = os.path.abspath(directory)
    for file in files:
        path = os.path.abspath(file)
        if os.path.splitext(path)[1] != ".safetensors":
            raise IntegrityError(f"{file} is no safetensors file and may run code when it is read: refused.")
        if os.path.commonpath([inside, path]) != inside:
            raise IntegrityError(f"{file} lies outside {directory}: refused.")


def check_index(path: Path) -> None:
    """Refuse an index of weight files that names anything but files beside it.

    Raises:
        IntegrityError: the message names the weight and the file.
    """
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise IntegrityError(f"{path} has no weight_map.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != Path(file).name:
            raise IntegrityError(f"{path}: {name} lies in '{file}', outside the directory: refused.")
        if not (path.parent / file).is_file():
            raise IntegrityError(f"{path}: {name} lies in {file}, which is missing.")


def check_header(path: Path) -> None:
    """Refuse a file whose header is no sound safetensors header.

    Raises:
        IntegrityError: the message names the file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path} is no sound safetensors file: {error}.") from error


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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' occurs twice")
    return table


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not allowed in it")
