"""What the directory of a model to compress must be before a weight in it is read: JSON and safetensors, no more."""

import json
import logging
from pathlib import Path
from typing import Any

from casp_pl.errors import InputError, IntegrityError
from casp_pl.models.weight_files import checked_weight_map, weight_file

__all__ = ["check_config", "check_original"]

_CONFIG = "config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LOG = logging.getLogger(__name__)


def check_config(directory: Path) -> None:
    """Refuse a directory without a config, or with that of a quantized model; say that code of its own is ignored.

    Raises:
        InputError: there is no config, or the model is quantized already.
        IntegrityError: the config is no JSON object.
    """
    if not (directory / _CONFIG).is_file():
        raise InputError(f"model.source: {directory} holds no model (no {_CONFIG}).")
    config = _read_object(directory / _CONFIG)
    if "auto_map" in config:
        _LOG.warning("%s asks for code of its own (auto_map): ignored", directory / _CONFIG)
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise InputError(f"model.source: {directory} is quantized already ({method}): give the original model.")


def check_original(directory: Path) -> None:
    """`check_config`, and refuse weights that are unsafe to read. Pickles beside safetensors are not read.

    Raises:
        InputError: there is no config or no weight, or the model is quantized already.
        IntegrityError: a broken config or header, weights that are pickles only, an index that points outside.
    """
    check_config(directory)
    for index in sorted(directory.glob("*.safetensors.index.json")):
        checked_weight_map(index, _read_object(index))
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        pickles = [path.name for path in sorted(directory.iterdir()) if path.suffix in _PICKLES]
        if pickles:
            raise IntegrityError(
                f"model.source: {directory} holds pickles alone ({pickles[0]}), which may run code: refused.\n"
                "Convert them to safetensors first."
            )
        raise InputError(f"model.source: {directory} holds no weights (no .safetensors file).")
    for path in weights:
        with weight_file(path):
            pass  # its header is sound


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{path} holds a {type(value).__name__}, not an object.")
    return value
