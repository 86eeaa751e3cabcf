"""One place that turns a name into a model: the embedded demo, the tiny random model, or a Hugging Face directory."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from casp_pl.errors import InputError
from casp_pl.models.demo import load_demo
from casp_pl.models.tiny import load_tiny

__all__ = ["load_model"]


def load_model(source: str = "embedded", dtype: Literal["float32", "bfloat16", "float16"] = "float32") -> tuple[nn.Module, Any]:
    """A frozen model in evaluation mode and its processor (a tokenizer for a text model).

    Args:
        source: `embedded` (SmolLM2 with a vision tower, comes with the package), `embedded-text` (SmolLM2 alone), `tiny`
            (random, for tests), or a directory or hub name of a LLaVA or LLaMA-type model.
        dtype: the type that everything is computed in; on a CPU float32 is by far the fastest.

    Raises:
        InputError: the model cannot be found or read.
    """
    if source == "tiny":
        model, processor = load_tiny()
    elif source in ("embedded", "embedded-text"):
        model, processor = load_demo(text_only=source == "embedded-text")
    else:
        model, processor = _load_hugging_face(source)
    return model.to(getattr(torch, dtype)).eval().requires_grad_(False), processor


def _load_hugging_face(source: str) -> tuple[nn.Module, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    if not Path(source).exists() and source.count("/") != 1:
        raise InputError(f"model.source: '{source}' is neither embedded, tiny, a directory, nor a hub name like org/name.")
    try:
        config = AutoConfig.from_pretrained(source)
        if hasattr(config, "vision_config"):
            return AutoModelForImageTextToText.from_pretrained(source), AutoProcessor.from_pretrained(source)
        return AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"model.source: cannot load '{source}': {reason}\nGive a local directory if the hub is out of reach.") from error
