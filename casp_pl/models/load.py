"""One place that turns a name into a model: the embedded demo, the tiny random model, or a Hugging Face directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from casp_pl.errors import ConfigError, InputError
from casp_pl.models.adapter import ModelAdapter, adapt
from casp_pl.models.demo import load_demo
from casp_pl.models.memory import fits_in_memory
from casp_pl.models.streamed import load_streamed
from casp_pl.models.tiny import load_tiny
from casp_pl.models.weight_files import has_safetensors

__all__ = ["ModelSource", "load_model"]

_OWN = ("embedded", "embedded-text", "tiny")


class ModelSource:
    """Where a model comes from.

    Args:
        source: `embedded` (SmolLM2 with a vision tower, comes with the package), `embedded-text` (SmolLM2 alone),
            `tiny` (random, for tests), or a directory or hub name of a LLaVA or LLaMA-type model.
        dtype: the type that everything is computed in; on a CPU float32 is by far the fastest.
        streaming: whether the decoder blocks stay on disk and are read one at a time; null does so where the model
            does not fit into free memory comfortably. The results are the same.
    """

    def __init__(
        self,
        *,
        source: str = "embedded",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        streaming: bool | None = None,
    ) -> None:
        self.source = source
        self.dtype = dtype
        self.streaming = streaming

    def open(self, device: torch.device) -> tuple[ModelAdapter, Any]:
        """The adapter of the model on a device, streamed or in memory, and its processor.

        Raises:
            InputError: the model cannot be found or read.
            ConfigError: it cannot be streamed, but is to be.
        """
        dtype = getattr(torch, self.dtype)
        directory = None if self.streaming is False else self._directory()
        if directory is not None and (self.streaming or not fits_in_memory(directory, dtype, device)):
            factory, processor = _factory_and_processor(str(directory))
            return load_streamed(directory, factory, dtype=dtype, device=device), processor
        if self.streaming:
            raise ConfigError(f"model.streaming: '{self.source}' has no safetensors to read from; set it to false.")
        model, processor = self.load()
        return adapt(model.to(device)), processor

    def _directory(self) -> Path | None:
        """Where the model's safetensors lie, fetched from the hub if need be; None if it has none."""
        if self.source in _OWN:
            return None
        directory = Path(self.source) if Path(self.source).is_dir() else _snapshot(self.source)
        return directory if has_safetensors(directory) else None

    def load(self) -> tuple[Any, Any]:
        """A frozen model in evaluation mode and its processor (a tokenizer for a text model).

        Raises:
            InputError: the model cannot be found or read.
        """
        model: Any
        processor: Any
        if self.source == "tiny":
            model, processor = load_tiny()
        elif self.source in ("embedded", "embedded-text"):
            model, processor = load_demo(text_only=self.source == "embedded-text")
        else:
            model, processor = _load_hugging_face(self.source, getattr(torch, self.dtype))
        for parameter in model.parameters():  # not buffers: rotary embeddings need their frequencies in float32
            parameter.data = parameter.data.to(getattr(torch, self.dtype))
        return model.eval().requires_grad_(False), processor


def load_model(source: str = "embedded") -> tuple[Any, Any]:
    """`ModelSource(source=source).load()`: a frozen fp32 model and its processor."""
    return ModelSource(source=source).load()


def _load_hugging_face(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    factory, processor = _factory_and_processor(source)
    with _explained(source):
        return factory.from_pretrained(source, dtype=dtype), processor


def _factory_and_processor(source: str) -> tuple[Any, Any]:
    """The Auto class of the model, and its processor or tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    with _explained(source):
        if hasattr(AutoConfig.from_pretrained(source), "vision_config"):
            processor: Any = AutoProcessor.from_pretrained(source)  # type: ignore[no-untyped-call]
            return AutoModelForImageTextToText, processor
        return AutoModelForCausalLM, AutoTokenizer.from_pretrained(source)


def _snapshot(source: str) -> Path:
    """The files of a model of the hub, in its cache."""
    from huggingface_hub import snapshot_download

    with _explained(source):
        return Path(
            snapshot_download(source, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"])
        )


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turns what goes wrong in reading a model into one sentence."""
    if not Path(source).exists() and source.count("/") != 1:
        raise InputError(
            f"model.source: '{source}' is neither embedded, tiny, a directory, nor a hub name like org/name."
        )
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"model.source: cannot load '{source}': {reason}\nGive a local directory if the hub is out of reach."
        ) from error
