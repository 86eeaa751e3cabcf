"""A model without its weights: structure on the meta device, and what the headers of its files say of the dtypes.

Everything that a forecast needs - shapes, names, ties, the bytes of every tensor - is known before a weight is read.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from casp_pl.models.demo.language import find_gguf, load_tokenizer
from casp_pl.models.demo.llava import demo_config, load_processor, set_end_tokens
from casp_pl.models.load import ModelSource, explained, factory_and_processor
from casp_pl.models.original import check_config, check_original
from casp_pl.models.tiny import load_tiny
from casp_pl.models.weight_files import weight_file

__all__ = ["Skeleton", "load_skeleton"]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Skeleton:
    """A model whose tensors have no memory.

    Attributes:
        model: on the meta device, in the dtype that it is computed in.
        processor: its processor or tokenizer; this one is complete.
        headers: name of a tensor in the source's files to the dtype there; None where every value is one of float16.
    """

    model: Any
    processor: Any
    headers: Mapping[str, torch.dtype] | None


def load_skeleton(source: ModelSource) -> Skeleton:
    """The structure of what `source.load()` returns. Reads configs, tokenizers and headers of safetensors files.

    Raises:
        InputError: the model cannot be found.
    """
    headers: Mapping[str, torch.dtype] | None = None
    processor: Any
    if source.source == "tiny":
        real, processor = load_tiny()
        model = _on_meta(type(real), real.config)
        model.generation_config = real.generation_config
    elif source.source == "embedded":
        processor = load_processor()
        model = _embedded(processor)
    elif source.source == "embedded-text":
        model, processor = _embedded_text(), load_tokenizer()
    else:
        model, processor, headers = _hugging_face(source)
    return Skeleton(model.to(getattr(torch, source.dtype)).eval().requires_grad_(False), processor, headers)


def _on_meta(factory: Any, config: Any) -> Any:
    with torch.device("meta"):
        model = factory(config)
    model.tie_weights()
    return model


def _embedded(processor: Any) -> Any:
    from transformers import AutoConfig, LlavaForConditionalGeneration

    gguf = find_gguf()
    text_config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = demo_config(text_config, processor.tokenizer.convert_tokens_to_ids(processor.image_token))
    model = _on_meta(LlavaForConditionalGeneration, config)
    set_end_tokens(model)
    return model


def _embedded_text() -> Any:
    from transformers import AutoConfig, LlamaForCausalLM

    gguf = find_gguf()
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config.dtype = "float32"
    return _on_meta(LlamaForCausalLM, config)


def _hugging_face(source: ModelSource) -> tuple[Any, Any, dict[str, torch.dtype]]:
    from transformers import AutoConfig, GenerationConfig

    directory = source.directory(weights=False)
    (check_original if Path(source.source).is_dir() else check_config)(directory)
    factory, processor = factory_and_processor(source.source, directory)
    with explained(source.source):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            if part is not None:
                part.dtype = getattr(torch, source.dtype)  # from_pretrained says so too, and so it is saved
        with torch.device("meta"):
            model = factory.from_config(config)
        model.tie_weights()
        with suppress(OSError):  # many models have none
            model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
        return model, processor, _headers(source, directory)


def _headers(source: ModelSource, directory: Path) -> dict[str, torch.dtype]:
    """Name to dtype of every tensor in the safetensors files, of the directory or else of the hub."""
    files = sorted(directory.glob("*.safetensors"))
    if not files and not Path(source.source).is_dir():
        from huggingface_hub import get_safetensors_metadata

        remote = get_safetensors_metadata(source.source, revision=source.revision).files_metadata.values()
        return {name: _dtype(info.dtype) for file in remote for name, info in file.tensors.items()}
    found: dict[str, torch.dtype] = {}
    for path in files:
        with weight_file(path) as reader:
            found |= {name: _dtype(reader.get_slice(name).get_dtype()) for name in reader.keys()}  # noqa: SIM118
    return found


def _dtype(name: str) -> torch.dtype:
    return _DTYPES.get(name, torch.uint8)
