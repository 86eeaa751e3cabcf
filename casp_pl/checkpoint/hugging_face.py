"""Compressed models as ordinary Hugging Face directories: save, load, nothing but JSON and safetensors."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from casp_pl.checkpoint.atomic import remove_leftovers, resource_error, sync_directory, temporary_path, write_text
from casp_pl.checkpoint.manifest import MANIFEST_NAME, Manifest, describe
from casp_pl.checkpoint.model_directory import CONFIG_NAME, check_layout, is_compressed_model
from casp_pl.checkpoint.reading import read_json
from casp_pl.errors import InputError, IntegrityError, ResourceError
from casp_pl.models.surgery import layer_specs

__all__ = ["load_compressed", "save_compressed"]

_LOG = logging.getLogger(__name__)


def save_compressed(model: nn.Module, processor: Any, out_dir: Path | str, *, card: str) -> None:
    """Write a model directory that `from_pretrained` loads after `import casp_pl`; it is absent or complete.

    float32 tensors that float16 holds exactly are stored so, and the config keeps float32: a reload is bit-equal.

    Args:
        model: a Hugging Face model whose linears were replaced by compressed layers.
        processor: its processor or tokenizer, saved beside it; None for none.
        out_dir: the directory; an older compressed model there is replaced.
        card: text of README.md, the model card.

    Raises:
        ResourceError: the disk is full, the place cannot be written, or something else lies there.
    """
    target = Path(out_dir)
    _check_target(target)
    temporary = temporary_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, target.name)
        temporary.mkdir()
        _write(model, processor, temporary, card)
        _put_in_place(temporary, target)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        raise resource_error(error, target, size) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_compressed(path: Path | str, *, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """The model in evaluation mode and its processor (None where none was saved).

    Args:
        path: what `save_compressed` wrote.
        device: where the model goes.

    Raises:
        InputError: there is no compressed model.
        IntegrityError: it is broken, was changed since it was written, or is unsafe to read.
    """
    directory = Path(path)
    if not (directory / CONFIG_NAME).is_file():
        raise InputError(f"{directory} holds no model; give a directory that `casp_pl fit` wrote, as runs/NAME/model.")
    read_json(directory / CONFIG_NAME)
    if not is_compressed_model(directory):
        raise InputError(f"{directory} holds a model, but none that casp_pl compressed.")
    check_layout(directory)
    _check_hashes(directory)
    with _without_progress_bars():
        model = _load_model(directory)
    return model.to(device).eval(), _load_processor(directory)


def _check_target(target: Path) -> None:
    if target.is_dir() and (not any(target.iterdir()) or is_compressed_model(target)):
        return
    if target.exists():
        raise ResourceError(f"{target} exists and is no compressed model: it is not overwritten.\nGive another place.")


def _write(model: Any, processor: Any, directory: Path, card: str) -> None:
    with _announced_as_compressed(model), _without_progress_bars():
        model.save_pretrained(directory)
    if processor is not None:
        processor.save_pretrained(directory)
    write_text(directory / "README.md", card)
    _seal(directory)


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


@contextmanager
def _announced_as_compressed(model: Any) -> Iterator[None]:
    """Let `save_pretrained` see the model as one that came out of `from_pretrained`; nothing of that stays."""
    from casp_pl.checkpoint.registration import CaspConfig, CaspHfQuantizer

    config, before = model.config, vars(model.config).get("quantization_config")
    quantizer = vars(model).get("hf_quantizer")
    config.quantization_config = CaspConfig(modules=layer_specs(model))
    model.hf_quantizer = CaspHfQuantizer(config.quantization_config)
    try:
        yield
    finally:
        del config.quantization_config, model.hf_quantizer
        if before is not None:
            config.quantization_config = before
        if quantizer is not None:
            model.hf_quantizer = quantizer


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _check_hashes(directory: Path) -> None:
    if not (directory / MANIFEST_NAME).exists():
        _LOG.warning("%s has no %s: nobody can tell whether its files are unchanged", directory, MANIFEST_NAME)
        return
    problems = Manifest.load(directory).problems(directory)
    if problems:
        name, problem = next(iter(problems.items()))
        raise IntegrityError(f"{directory / name} {problem}.\nMake or fetch the model again.")


def _load_model(directory: Path) -> Any:
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    import casp_pl.checkpoint.registration  # noqa: F401 - registers quant_method casp

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        factory: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
        model, loading = factory.from_pretrained(
            directory, output_loading_info=True, trust_remote_code=False, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, SafetensorError) as error:
        raise IntegrityError(f"{directory} cannot be loaded: {str(error).splitlines()[0]}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if loading[what]:
            names = sorted(str(entry) for entry in loading[what])
            raise IntegrityError(f"{directory}: {len(names)} {what.replace('_', ' ')}, the first is {names[0]}.")
    return model


def _load_processor(directory: Path) -> Any:
    from transformers import AutoProcessor, AutoTokenizer

    names = {path.name for path in directory.iterdir()}
    if not names & {"processor_config.json", "preprocessor_config.json", "tokenizer_config.json"}:
        return None
    whole = names & {"processor_config.json", "preprocessor_config.json"}
    factory: Any = AutoProcessor if whole else AutoTokenizer
    try:
        return factory.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise IntegrityError(f"the processor in {directory} cannot be loaded: {str(error).splitlines()[0]}") from error
