"""A model whose decoder blocks stay on disk: everything outside them is loaded as ever, by transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from casp_pl.errors import IntegrityError
from casp_pl.models.adapter import ModelAdapter, adapt
from casp_pl.models.soundness import require_materialized
from casp_pl.models.stored_blocks import LentBlock, StoredBlocks
from casp_pl.models.weight_files import tensor_files

__all__ = ["load_streamed"]


def load_streamed(directory: Path, factory: Any, *, dtype: torch.dtype, device: torch.device) -> ModelAdapter:
    """The adapter of a frozen model in evaluation mode that never has more than one of its blocks in memory.

    transformers loads a model of no decoder blocks: embeddings, vision tower, projector, norm, head, with its own names
    and ties. The blocks are made on the meta device then, and `LentBlock`s take their places.

    Args:
        directory: a Hugging Face model as safetensors that `check_original` has passed.
        factory: the Auto class that loads such a model.
        dtype: what everything is computed in.
        device: where it is put.

    Raises:
        IntegrityError: a file is broken or lies outside the directory, or a tensor is missing; the message names it.
        ConfigError: the model is of a kind that casp_pl does not know.
    """
    files = tensor_files(directory)
    model, decoder = _load_without_blocks(directory, factory, dtype)
    with torch.device("meta"):
        decoder.layers = type(decoder)(decoder.config).layers.to(dtype)
    adapter = adapt(model)
    prefix = f"{adapter.decoder_name}.layers."
    stored = StoredBlocks(model, adapter.blocks, prefix, files, device)
    lent = [LentBlock(stored.skeleton(number), _reader(stored, number)) for number in range(len(stored))]
    decoder.layers = nn.ModuleList(lent)
    require_materialized(model)
    model.to(device).eval().requires_grad_(False)
    return replace(adapter, stored=stored, read_outside=lambda: _load_without_blocks(directory, factory, dtype)[0])


def _reader(stored: StoredBlocks, number: int) -> Any:
    return lambda: stored.read(number)


def _load_without_blocks(directory: Path, factory: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model with an empty list of blocks and the config of the whole one, and its decoder."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    text = config.get_text_config()
    whole = {"num_hidden_layers": text.num_hidden_layers}
    if getattr(text, "layer_types", None) is not None:
        whole["layer_types"] = text.layer_types
    _set(text, {name: 0 if name == "num_hidden_layers" else [] for name in whole})
    with _without_report():
        model, loading = factory.from_pretrained(
            directory, config=config, dtype=dtype, output_loading_info=True, local_files_only=True, use_safetensors=True
        )
    decoder = model.get_decoder()
    for part in (model.config.get_text_config(), decoder.config):
        _set(part, whole)
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        if loading[what]:
            names = sorted(str(entry) for entry in loading[what])
            raise IntegrityError(f"{directory}: {len(names)} {what.replace('_', ' ')}, the first is {names[0]}.")
    return model, decoder


@contextmanager
def _without_report() -> Iterator[None]:
    """Transformers would list all tensors of the blocks as not expected."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _set(config: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)
