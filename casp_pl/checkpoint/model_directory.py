"""What a compressed model's directory must be before anything in it is trusted.

Only JSON and safetensors are read. Pickles and weights outside the directory are refused, its own code is ignored.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from casp_pl.checkpoint.manifest import MANIFEST_NAME, Manifest
from casp_pl.checkpoint.reading import read_json
from casp_pl.errors import CaspError, IntegrityError
from casp_pl.layers.build import build_layer
from casp_pl.models.weight_files import (
    CONFIG_NAME,
    PICKLES,
    check_header,
    check_index,
    check_weight_files,
    say_own_code_is_ignored,
)

__all__ = [
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "check_layout",
    "check_weight_files",
    "checked_modules",
    "directory_problems",
    "is_compressed_model",
]

QUANT_METHOD = "casp"
FORMAT_VERSION = 1


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
    say_own_code_is_ignored(directory, config)
    for index in sorted(directory.glob("*.index.json")):
        check_index(index)
    weights = [path for path in sorted(directory.iterdir()) if path.suffix in (".safetensors", *PICKLES)]
    check_weight_files(directory, weights)
    if not weights:
        raise IntegrityError(f"{directory} holds no weights (no .safetensors file).")
    for path in weights:
        check_header(path)


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
