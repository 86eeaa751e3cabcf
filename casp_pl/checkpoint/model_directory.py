"""What a compressed model's directory must be before anything in it is trusted.

Only JSON and safetensors are read. Pickles and weights outside the directory are refused, its own code is ignored.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from casp_pl.checkpoint.manifest import MANIFEST_NAME, Manifest
from casp_pl.checkpoint.reading import read_json
from casp_pl.errors import CaspError, IntegrityError
from casp_pl.layers.build import build_layer
from casp_pl.models.weight_files import checked_weight_map

__all__ = [
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "check_header",
    "check_layout",
    "check_weight_files",
    "checked_modules",
    "directory_problems",
    "is_compressed_model",
]

QUANT_METHOD = "casp"
FORMAT_VERSION = 1
CONFIG_NAME = "config.json"

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".msgpack")
_CODES = ("codes", "zeros", "column_groups")  # packed: of bytes every value is an entry, of wider numbers not
_LOG = logging.getLogger(__name__)


def checked_modules(modules: Any, version: Any) -> dict[str, dict[str, Any]]:
    """The module specs of a quantization_config, each of which `build_layer` can build.

    Raises:
        IntegrityError: another version, or a spec that describes no layer; the message names the module.
    """
    if version != FORMAT_VERSION:
        raise IntegrityError(f"quantization_config: version {version} cannot be read, only {FORMAT_VERSION}.")
    if not isinstance(modules, Mapping):
        raise IntegrityError("quantization_config: modules must be an object of module names and specs.")
    for name, spec in modules.items():
        try:
            build_layer(dict(spec), device="meta")
        except (CaspError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise IntegrityError(f"quantization_config: {name}: {error}") from error
    return {str(name): dict(spec) for name, spec in modules.items()}


def is_compressed_model(directory: Path) -> bool:
    """Whether a directory says of itself that it holds a model of this package."""
    try:
        config = read_json(directory / CONFIG_NAME)
    except IntegrityError:
        return False
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def check_layout(directory: Path) -> None:
    """Refuse a model directory that is broken or unsafe, before any weight is read.

    Raises:
        IntegrityError: a broken config, a pickle, an index that points outside, an unsound safetensors file.
    """
    config = read_json(directory / CONFIG_NAME)
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantization, dict):
        raise IntegrityError(f"{directory / CONFIG_NAME} has no quantization_config.")
    checked_modules(quantization.get("modules"), quantization.get("version"))
    if "auto_map" in config:
        _LOG.warning("%s asks for code of its own (auto_map): ignored", directory / CONFIG_NAME)
    for index in sorted(directory.glob("*.index.json")):
        checked_weight_map(index, read_json(index))
    weights = [path for path in sorted(directory.iterdir()) if path.suffix in (".safetensors", *_PICKLES)]
    check_weight_files(directory, weights)
    if not weights:
        raise IntegrityError(f"{directory} holds no weights (no .safetensors file).")
    for path in weights:
        check_header(path)


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


def directory_problems(directory: Path) -> list[str]:
    """Everything that is wrong with a model directory, structure and hashes; empty where it is sound."""
    problems = []
    try:
        check_layout(directory)
    except IntegrityError as error:
        problems.append(str(error))
    try:
        manifest = Manifest.load(directory)
    except IntegrityError as error:
        return [*problems, str(error)]
    problems += [f"{directory / name} {problem}." for name, problem in manifest.problems(directory).items()]
    known = {*manifest.artifacts, MANIFEST_NAME}
    strangers = [path for path in sorted(directory.glob("*.safetensors")) if path.name not in known]
    return problems + [f"{path} is not in {MANIFEST_NAME}." for path in strangers]


def check_header(path: Path) -> None:
    """Refuse a broken weight file, and codes that are stored as anything but bytes.

    Raises:
        IntegrityError: the message names the file and, of wrong codes, the tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name.rsplit(".", 1)[-1] in _CODES and (kind := file.get_slice(name).get_dtype()) != "U8":
                    raise IntegrityError(f"{path}: {name} is stored as {kind}, but codes are bytes (U8).")
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path} is no sound safetensors file: {error}.") from error
