"""Compressed models as ordinary Hugging Face directories: save, load, nothing but JSON and safetensors."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from casp_pl.checkpoint.atomic import write_json, write_text
from casp_pl.checkpoint.directory import write_directory
from casp_pl.checkpoint.manifest import MANIFEST_NAME, Manifest
from casp_pl.checkpoint.model_directory import CONFIG_NAME, check_layout, is_compressed_model
from casp_pl.checkpoint.reading import read_json
from casp_pl.checkpoint.stored_names import compact_state_dict
from casp_pl.errors import InputError, IntegrityError
from casp_pl.models.surgery import layer_specs

__all__ = ["empty_model", "load_compressed", "save_compressed", "save_plain", "without_progress_bars", "write_beside"]

_LOG = logging.getLogger(__name__)


def save_compressed(
    model: nn.Module, processor: Any, out_dir: Path | str, *, card: str, half: torch.dtype = torch.float16
) -> None:
    """Write a model directory that `from_pretrained` loads after `import casp_pl`; it is absent or complete.

    float32 tensors that float16 or bfloat16 holds exactly are stored so, and the config keeps float32: a reload is
    bit-equal.

    Args:
        model: a Hugging Face model whose linears were replaced by compressed layers.
        processor: its processor or tokenizer, saved beside it; None for none.
        out_dir: the directory; an older compressed model there is replaced.
        card: text of README.md, the model card.
        half: `half_of` the original: what that has in bfloat16 stays so, whatever the values are.

    Raises:
        ResourceError: the disk is full, the place cannot be written, or something else lies there.
    """
    write_directory(out_dir, lambda directory: _write(model, processor, directory, card, half), size=_size(model))


def save_plain(
    model: nn.Module, processor: Any, out_dir: Path | str, *, card: str, quantization_config: dict[str, Any] | None
) -> None:
    """Write a model directory for other tools; it is absent or complete.

    float32 tensors that float16 or bfloat16 holds exactly are stored so, and the config keeps float32.

    Args:
        model: a Hugging Face model that holds its tensors under the names in which the other tool reads them. What it
            knew of an earlier quantization is forgotten.
        processor: its processor or tokenizer, saved beside it; None for none.
        out_dir: a new directory.
        card: text of README.md, the model card.
        quantization_config: what config.json says of the layout; None for a dense model.

    Raises:
        ResourceError: the disk is full, the place cannot be written, or something else lies there.
    """
    write_directory(
        out_dir,
        lambda directory: _write_plain(model, processor, directory, card, quantization_config),
        size=_size(model),
    )


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
    with without_progress_bars():
        model = _load_model(directory)
    return model.to(device).eval(), _load_processor(directory)


def _write(model: Any, processor: Any, directory: Path, card: str, half: torch.dtype) -> None:
    with _announced_as_compressed(model, half), without_progress_bars():
        model.save_pretrained(directory)
    write_beside(processor, directory, card)


def _write_plain(
    model: Any, processor: Any, directory: Path, card: str, quantization_config: dict[str, Any] | None
) -> None:
    if (quantizer := vars(model).get("hf_quantizer")) is not None:
        quantizer.remove_quantization_config(model)
    with without_progress_bars():
        model.save_pretrained(directory, state_dict=compact_state_dict(model))
    if quantization_config is not None:
        config = read_json(directory / CONFIG_NAME)
        write_json(directory / CONFIG_NAME, config | {"quantization_config": quantization_config})
    write_beside(processor, directory, card)


def write_beside(processor: Any, directory: Path, card: str) -> None:
    """The processor and the model card."""
    if processor is not None:
        processor.save_pretrained(directory)
    write_text(directory / "README.md", card)


def _size(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


@contextmanager
def _announced_as_compressed(model: Any, half: torch.dtype) -> Iterator[None]:
    """Let `save_pretrained` see the model as one that came out of `from_pretrained`; nothing of that stays."""
    from casp_pl.checkpoint.registration import CaspConfig, CaspHfQuantizer

    config, before = model.config, vars(model.config).get("quantization_config")
    quantizer = vars(model).get("hf_quantizer")
    config.quantization_config = CaspConfig(modules=layer_specs(model))
    model.hf_quantizer = CaspHfQuantizer(config.quantization_config)
    model.hf_quantizer.half = half
    try:
        yield
    finally:
        del config.quantization_config, model.hf_quantizer
        if before is not None:
            config.quantization_config = before
        if quantizer is not None:
            model.hf_quantizer = quantizer


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Inside, transformers shows no bars of its own."""
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


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise IntegrityError(f"{directory} cannot be loaded: {reason}") from error


def empty_model(directory: Path) -> Any:
    """The model that config.json describes, before anything was compressed, on the meta device.

    Raises:
        IntegrityError: it describes none.
    """
    with _explained(directory):
        factory, config = _factory(directory)
        with torch.device("meta"):
            model = factory.from_config(config, trust_remote_code=False)
        model.tie_weights()
    return model


def _factory(directory: Path) -> tuple[Any, Any]:
    """The Auto class of a model, and its config."""
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    import casp_pl.checkpoint.registration  # noqa: F401 - registers quant_method casp

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if multimodal else AutoModelForCausalLM, config


def _load_model(directory: Path) -> Any:
    settings: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True, "use_safetensors": True}
    with _explained(directory):
        factory, _ = _factory(directory)
        model, loading = factory.from_pretrained(directory, output_loading_info=True, **settings)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if loading[what]:
            names = sorted(str(entry) for entry in loading[what])
            raise IntegrityError(f"{directory}: {len(names)} {what.replace('_', ' ')}, the first is {names[0]}.")
    return model


def _load_processor(directory: Path) -> Any:
    from casp_pl.models.processors import load_processor

    names = {path.name for path in directory.iterdir()}
    whole = names & {"processor_config.json", "preprocessor_config.json"}
    if not whole and "tokenizer_config.json" not in names:
        return None
    try:
        model_type = read_json(directory / CONFIG_NAME).get("model_type", "")
        return load_processor(directory, model_type, takes_images=bool(whole))
    except (OSError, ValueError, KeyError) as error:
        raise IntegrityError(f"the processor in {directory} cannot be loaded: {str(error).splitlines()[0]}") from error
