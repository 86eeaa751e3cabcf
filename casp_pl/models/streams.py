"""Activations block by block: the inputs of block 0, the inputs of the linears, the outputs of a block.

Shapes: B batch, T sequence, I in_features.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from casp_pl.models.activations import Keep, in_memory
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.branches import additive_mask, real_tokens

__all__ = [
    "BlockBatch",
    "first_block_batches",
    "linear_inputs",
    "model_inputs",
    "run_block",
    "run_blocks",
    "run_blocks_seeing",
]


@dataclass(frozen=True)
class BlockBatch:
    """What a block reads for one batch.

    Attributes:
        hidden: (B, T, I) block inputs.
        real: (B, T) bool, False at padding; see `real_tokens`.
        image: (B, T) bool, True at image patches.
        arguments: the block's other keyword arguments (attention mask, rotary embeddings, positions); the same for all
            blocks.
        autocast: what blocks multiply matrices in (`torch.autocast`); None for the dtype of their weights.
    """

    hidden: Tensor
    real: Tensor
    image: Tensor
    arguments: Mapping[str, Any]
    autocast: torch.dtype | None = None

    def with_hidden(self, hidden: Tensor) -> "BlockBatch":
        """The same batch further along."""
        return replace(self, hidden=hidden)


class _StopForwardError(Exception):
    """Ends a forward pass once everything wanted has been seen."""


@torch.no_grad()
def first_block_batches(
    adapter: ModelAdapter,
    batches: Iterable[Mapping[str, Any]],
    autocast: torch.dtype | None = None,
    keep: Keep = in_memory,
) -> list[BlockBatch]:
    """Run embeddings, vision tower and projector, and `keep` what block 0 is given; see `BlockBatch.autocast`."""
    caught: list[tuple[Tensor, dict[str, Any]]] = []

    def catch(_: nn.Module, positional: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        keywords = dict(keywords)
        hidden = positional[0] if positional else keywords.pop("hidden_states")
        caught.append((hidden, keywords | {"past_key_values": None, "use_cache": False}))
        raise _StopForwardError

    result = []
    handle = adapter.blocks[0].register_forward_pre_hook(catch, with_kwargs=True)  # a stored block is not read for it
    try:
        for batch in batches:
            try:
                adapter.model(**model_inputs(batch, adapter.model.dtype), use_cache=False)
            except _StopForwardError:
                hidden, arguments = caught.pop()
            real = real_tokens(batch)
            image = adapter.image_mask(batch["input_ids"]) & real
            result.append(BlockBatch(keep(hidden), real, image, arguments, autocast))
    finally:
        handle.remove()
    return result


def _autocast_to(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[None]:
    """Inside, matrices are multiplied in this dtype; with None nothing changes."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def model_inputs(batch: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The part of a collated batch that the forward of a model of this dtype takes."""
    keys = ("input_ids", "attention_mask", "position_ids", "pixel_values")
    inputs = {key: batch[key] for key in keys if batch.get(key) is not None}
    if "branches" in batch:
        inputs["attention_mask"] = additive_mask(batch, dtype)
    return inputs


def run_block(block: nn.Module, batch: BlockBatch) -> Tensor:
    """The block's output (B, T, I), on the device of the block; inputs that were kept elsewhere are moved there."""
    inputs = batch.hidden.to(batch.real.device)
    with _autocast_to(batch.autocast, inputs.device):
        output = block(inputs, **batch.arguments)
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@torch.no_grad()
def run_blocks(block: nn.Module, batches: Sequence[BlockBatch], keep: Keep = in_memory) -> list[BlockBatch]:
    """Every batch one block further along."""
    return [batch.with_hidden(keep(run_block(block, batch))) for batch in batches]


@torch.no_grad()
def run_blocks_seeing(
    block: nn.Module, batches: Sequence[BlockBatch], names: Sequence[str], keep: Keep = in_memory
) -> tuple[list[BlockBatch], list[dict[str, Tensor]]]:
    """`run_blocks`, and on the way per batch what the named linears read at real tokens, each (real tokens, I)."""
    outputs, inputs = [], []
    for batch in batches:
        with _watched(block, batch, names) as seen:
            outputs.append(batch.with_hidden(keep(run_block(block, batch))))
        inputs.append({name: keep(tensor) for name, tensor in seen.items()})
        seen.clear()
    return outputs, inputs


@torch.no_grad()
def linear_inputs(block: nn.Module, batch: BlockBatch, names: Sequence[str]) -> dict[str, Tensor]:
    """Inputs of the named linears at real tokens, each (real tokens, I); the pass ends as soon as all are seen."""
    with _watched(block, batch, names, stop=True) as seen, suppress(_StopForwardError):
        run_block(block, batch)
    return seen


@contextmanager
def _watched(
    block: nn.Module, batch: BlockBatch, names: Sequence[str], *, stop: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Inside, the inputs of the named linears are noted; with `stop` the last of them ends the pass."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, positional: tuple[Tensor, ...]) -> None:
            seen[name] = positional[0][batch.real]
            if stop and len(seen) == len(names):
                raise _StopForwardError

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
