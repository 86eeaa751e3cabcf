"""lm-eval's model `casp`: what `fit` saved, without images. Importing this module registers it."""

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from casp_pl.checkpoint import load_compressed
from casp_pl.data.tokenize import tokenizer_of

__all__ = ["CaspLanguageModel"]


@register_model("casp")
class CaspLanguageModel(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's own Hugging Face model around a compressed one; tasks are text.

    Args:
        pretrained: directory of the model.
        device: where it goes; a GPU if there is one.
        settings: further arguments of lm-eval's `HFLM`, such as batch_size and max_length.
    """

    def __init__(self, pretrained: str, device: str | None = None, **settings: Any) -> None:
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, processor = load_compressed(pretrained, device=place)
        super().__init__(pretrained=model, tokenizer=tokenizer_of(processor), backend="causal", **settings)
