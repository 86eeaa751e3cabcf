"""One place that turns a name into a model: the embedded demo, the tiny random model, or a Hugging Face directory."""

from pathlib import Path
from typing import Any, Literal

import torch

from casp_pl.errors import InputError
from casp_pl.models.demo import load_demo, load_processor, load_tokenizer
from casp_pl.models.tiny import load_tiny

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
        """
        model: Any
        processor: Any
        if self.source == "tiny":
            model, processor = load_tiny()
        elif self.source in ("embedded", "embedded-text"):
            model, processor = load_demo(text_only=self.source == "embedded-text")
        else:
            model, processor = _load_hugging_face(self.source)
        return model.to(getattr(torch, self.dtype)).eval().requires_grad_(False), processor

    def load_processor(self) -> Any:
        """The processor alone (a tokenizer for a text model), without reading the weights.

        Raises:
            InputError: it cannot be found or read.
        """
        if self.source == "tiny":
            return load_tiny()[1]
        if self.source in ("embedded", "embedded-text"):
            return load_processor() if self.source == "embedded" else load_tokenizer()
        from transformers import AutoProcessor

        try:
            return AutoProcessor.from_pretrained(self.source)  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"model.source: cannot load the processor of '{self.source}': {reason}") from error


def load_model(source: str = "embedded") -> tuple[Any, Any]:
    """`ModelSource(source=source).load()`: a frozen fp32 model and its processor."""
    return ModelSource(source=source).load()


def _load_hugging_face(source: str) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    if not Path(source).exists() and source.count("/") != 1:
        raise InputError(
            f"model.source: '{source}' is neither embedded, tiny, a directory, nor a hub name like org/name."
        )
    try:
        config = AutoConfig.from_pretrained(source)
        if hasattr(config, "vision_config"):
            processor = AutoProcessor.from_pretrained(source)  # type: ignore[no-untyped-call]
            return AutoModelForImageTextToText.from_pretrained(source), processor
        return AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"model.source: cannot load '{source}': {reason}\nGive a local directory if the hub is out of reach."
        ) from error
