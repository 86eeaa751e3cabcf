"""Activations block by block: the inputs of block 0, the inputs of the linears, the outputs of a block.

Shapes: B batch, T sequence, I in_features.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.branches import additive_mask, real_tokens
from casp_pl.models.micro_batch import in_halves

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

    def __len__(self) -> int:
        return len(self.hidden)

    def halves(self) -> tuple["BlockBatch", "BlockBatch"]:
        """The first half of the samples and the rest."""
        middle = len(self) // 2
        return self._rows(slice(middle)), self._rows(slice(middle, None))

    def _rows(self, rows: slice) -> "BlockBatch":
        arguments = {name: _rows_of(value, rows, len(self)) for name, value in self.arguments.items()}
        return replace(
            self, hidden=self.hidden[rows], real=self.real[rows], image=self.image[rows], arguments=arguments
        )


def _rows_of(argument: Any, rows: slice, count: int) -> Any:
    """The part of a block's argument that belongs to these rows; what samples share stays whole."""
    if isinstance(argument, tuple):
        return tuple(_rows_of(item, rows, count) for item in argument)
    has_rows = isinstance(argument, Tensor) and argument.dim() > 1 and len(argument) == count
    return argument[rows] if has_rows else argument


class _StopForwardError(Exception):
    """Ends a forward pass once everything wanted has been seen."""


@torch.no_grad()
def first_block_batches(
    adapter: ModelAdapter, batches: Iterable[Mapping[str, Any]], autocast: torch.dtype | None = None
) -> list[BlockBatch]:
    """Run embeddings, vision tower and projector, and catch what block 0 is given; see `BlockBatch.autocast`."""
    caught: list[tuple[Tensor, dict[str, Any]]] = []

    def catch(_: nn.Module, positional: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        keywords = dict(keywords)
        hidden = positional[0] if positional else keywords.pop("hidden_states")
        caught.append((hidden, keywords | {"past_key_values": None, "use_cache": False}))
        raise _StopForwardError

    result = []
    handle = adapter.blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches:
            try:
                adapter.model(**model_inputs(batch, adapter.model.dtype), use_cache=False)
            except _StopForwardError:
                hidden, arguments = caught.pop()
            real = real_tokens(batch)
            image = adapter.image_mask(batch["input_ids"]) & real
            result.append(BlockBatch(hidden, real, image, arguments, autocast))
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
    """The block's output (B, T, I)."""
    with _autocast_to(batch.autocast, batch.hidden.device):
        output = block(batch.hidden, **batch.arguments)
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@torch.no_grad()
def run_blocks(block: nn.Module, batches: Sequence[BlockBatch]) -> list[BlockBatch]:
    """Every batch one block further along."""
    return [batch.with_hidden(in_halves(partial(run_block, block), batch, torch.cat)) for batch in batches]


@torch.no_grad()
def run_blocks_seeing(
    block: nn.Module, batches: Sequence[BlockBatch], names: Sequence[str]
) -> tuple[list[BlockBatch], list[dict[str, Tensor]]]:
    """`run_blocks`, and on the way per batch what the named linears read at real tokens, each (real tokens, I)."""

    def run(batch: BlockBatch) -> tuple[Tensor, dict[str, Tensor]]:
        with _watched(block, batch, names) as seen:
            return run_block(block, batch), seen

    def join(parts: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.cat([hidden for hidden, _ in parts]), _joined([seen for _, seen in parts])

    outputs, inputs = [], []
    for batch in batches:
        hidden, seen = in_halves(run, batch, join)
        outputs.append(batch.with_hidden(hidden))
        inputs.append(seen)
    return outputs, inputs


@torch.no_grad()
def linear_inputs(block: nn.Module, batch: BlockBatch, names: Sequence[str]) -> dict[str, Tensor]:
    """Inputs of the named linears at real tokens, each (real tokens, I); the pass ends as soon as all are seen."""

    def run(batch: BlockBatch) -> dict[str, Tensor]:
        with _watched(block, batch, names, stop=True) as seen, suppress(_StopForwardError):
            run_block(block, batch)
        return seen

    return in_halves(run, batch, _joined)


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What was seen of the halves of a batch, one after the other."""
    return {name: torch.cat([seen[name] for seen in parts]) for name in parts[0]}


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
