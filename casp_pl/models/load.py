"""One place that turns a name into a model: the embedded demo, the tiny random model, or a Hugging Face directory."""

from pathlib import Path
from typing import Any, Literal

import torch

from casp_pl.errors import InputError
from casp_pl.models.demo import load_demo
from casp_pl.models.hub import hub_directory
from casp_pl.models.tiny import load_tiny
from casp_pl.models.weight_files import check_original

__all__ = ["ModelSource", "load_model"]


class ModelSource:
    """Where a model comes from.

    Args:
        source: `embedded` (SmolLM2 with a vision tower, comes with the package), `embedded-text` (SmolLM2 alone),
            `tiny` (random, for tests), or a directory or hub name of a LLaVA or LLaMA-type model.
        dtype: the type that everything is computed in; on a CPU float32 is by far the fastest.
    """

    def __init__(
        self, *, source: str = "embedded", dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    ) -> None:
        self.source = source
        self.dtype = dtype

    def load(self) -> tuple[Any, Any]:
        """A frozen model in evaluation mode and its processor (a tokenizer for a text model).

        Raises:
            InputError: the model cannot be found or read.
            IntegrityError: its files are unsafe to read.
        """
        dtype = getattr(torch, self.dtype)
        model: Any
        processor: Any
        if self.source == "tiny":
            model, processor = load_tiny()
        elif self.source in ("embedded", "embedded-text"):
            model, processor = load_demo(text_only=self.source == "embedded-text")
        else:
            model, processor = _load_hugging_face(self.source, dtype)
        return model.to(dtype).eval().requires_grad_(False), processor


def load_model(source: str = "embedded") -> tuple[Any, Any]:
    """`ModelSource(source=source).load()`: a frozen fp32 model and its processor."""
    return ModelSource(source=source).load()


def _load_hugging_face(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    from casp_pl.models.processors import load_processor

    directory = _directory(source)
    check_original(directory)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        factory: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
        model, loading = factory.from_pretrained(
            directory,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
        )
        processor = load_processor(directory, config.model_type, takes_images=multimodal)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"model.source: cannot load '{source}': {reason}") from error
    lost = sorted(str(entry) for what in ("missing_keys", "mismatched_keys") for entry in loading[what])
    if lost:
        raise InputError(
            f"model.source: '{source}' lacks {len(lost)} weights of a {type(model).__name__}, the first is {lost[0]}."
        )
    return model, processor


def _directory(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or source.count("/") != 1:
        raise InputError(
            f"model.source: '{source}' is neither embedded, tiny, a directory, nor a hub name like org/name."
        )
    return hub_directory(source)
