"""What a compressed model's directory must be before anything in it is trusted.

Only JSON and safetensors are read. Pickles and weights outside the directory are refused, its own code is ignored.
"""

import logging
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from casp_pl.checkpoint.reading import read_json
from casp_pl.errors import CaspError, IntegrityError
from casp_pl.layers.build import build_layer
from casp_pl.models.weight_files import checked_weight_map, weight_file

__all__ = [
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "check_header",
    "check_layout",
    "check_weight_files",
    "check_weights",
    "checked_modules",
    "is_compressed_model",
    "quantization_of",
    "unsafe_files",
]

QUANT_METHOD = "casp"
FORMAT_VERSION = 1
CONFIG_NAME = "config.json"

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".msgpack")
_ZIP = b"PK\x03\x04"
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


def quantization_of(directory: Path) -> dict[str, Any] | None:
    """The quantization_config of a model directory; None where its config.json has none.

    Raises:
        IntegrityError: config.json is missing or broken.
    """
    config = read_json(directory / CONFIG_NAME)
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return quantization if isinstance(quantization, dict) else None


def is_compressed_model(directory: Path) -> bool:
    """Whether a directory says of itself that it holds a model of this package."""
    try:
        quantization = quantization_of(directory)
    except IntegrityError:
        return False
    return quantization is not None and quantization.get("quant_method") == QUANT_METHOD


def check_layout(directory: Path) -> None:
    """Refuse a directory of a compressed model that is broken or unsafe, before any weight is read.

    Raises:
        IntegrityError: a broken config, a pickle, an index that points outside, an unsound safetensors file.
    """
    quantization = quantization_of(directory)
    if quantization is None:
        raise IntegrityError(f"{directory / CONFIG_NAME} has no quantization_config.")
    checked_modules(quantization.get("modules"), quantization.get("version"))
    if "auto_map" in read_json(directory / CONFIG_NAME):
        _LOG.warning("%s asks for code of its own (auto_map): ignored", directory / CONFIG_NAME)
    check_weights(directory)


def check_weights(directory: Path) -> None:
    """Refuse weights that are unsafe to read or missing, in any layout.

    Raises:
        IntegrityError: a pickle, an index or a link that points outside, an unsound safetensors file, or no weight.
    """
    for index in sorted(directory.glob("*.index.json")):
        checked_weight_map(index, read_json(index))
    weights = [path for path in sorted(directory.iterdir()) if path.suffix in (".safetensors", *_PICKLES)]
    check_weight_files(directory, weights)
    if not weights:
        raise IntegrityError(f"{directory} holds no weights (no .safetensors file).")
    for path in weights:
        with weight_file(path):
            pass  # its header is sound


def check_weight_files(directory: Path, files: Sequence[Path | str]) -> None:
    """Refuse weight files that are pickles or lie outside the directory.

    Raises:
        IntegrityError: the message names the file.
    """
    for file in files:
        if Path(file).suffix != ".safetensors":
            raise IntegrityError(f"{file} is no safetensors file and may run code when it is read: refused.")
        if not _lies_inside(Path(file), directory):
            raise IntegrityError(f"{file} lies outside {directory}: refused.")


def unsafe_files(directory: Path) -> list[str]:
    """One sentence for every pickle and every link to the outside, at any depth."""
    problems = []
    for path in sorted(directory.rglob("*")):
        if not _lies_inside(path, directory):
            problems.append(f"{path} lies outside {directory}: refused.")
        elif path.is_file() and _is_pickle(path):
            problems.append(f"{path} is a pickle and may run code when it is read: refused.")
    return problems


def _lies_inside(path: Path, directory: Path) -> bool:
    """Whether a path, links followed, ends in the directory; or in the blobs that a snapshot of the hub links to."""
    real = directory.resolve()
    repository = real.parents[1] if real.parent.name == "snapshots" else None
    try:
        end = path.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself, which Python 3.11 calls a RuntimeError
        return False
    return any(place is not None and end.is_relative_to(place) for place in (real, repository))


def _is_pickle(path: Path) -> bool:
    if path.suffix in _PICKLES:
        return True
    with path.open("rb") as file:
        start = file.read(9).ljust(9, b"\0")
    if start.startswith(_ZIP):
        return _holds_pickles(path)
    header = start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size  # of safetensors
    return start[0] == 0x80 and 2 <= start[1] <= 5 and not header


def _holds_pickles(path: Path) -> bool:
    """Whether a zip file may be one of `torch.save`; one whose list of files cannot be read may, torch reads more."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(Path(name).suffix in _PICKLES for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, ValueError, EOFError):
        return True


def check_header(path: Path) -> None:
    """Refuse a broken weight file, and codes that are stored as anything but bytes.

    Raises:
        IntegrityError: the message names the file and, of wrong codes, the tensor.
    """
    with weight_file(path) as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            if name.rsplit(".", 1)[-1] in _CODES and (kind := file.get_slice(name).get_dtype()) != "U8":
                raise IntegrityError(f"{path}: {name} is stored as {kind}, but codes are bytes (U8).")
