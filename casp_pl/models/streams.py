"""Activations block by block: the inputs of block 0, the inputs of the linears, the outputs of a block.

Shapes: B batch, T sequence, I in_features.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from casp_pl.models.activations import Keep, in_memory
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.branches import additive_mask, real_tokens, refuse_short_windows
from casp_pl.models.micro_batch import in_halves
from casp_pl.models.reached import Reached, begun_at, closing_linears

__all__ = [
    "BlockBatch",
    "autocast_to",
    "batch_on",
    "closing_linears_of",
    "first_block_batches",
    "linear_inputs",
    "model_inputs",
    "reach",
    "run_block",
    "run_blocks",
    "run_blocks_seeing",
]

_MODEL_INPUTS = (
    "input_ids", "attention_mask", "position_ids", "pixel_values", "image_sizes", "pixel_values_videos",
)  # fmt: skip


@dataclass(frozen=True)
class BlockBatch:
    """What a block reads for one batch.

    Attributes:
        hidden: (B, T, I) block inputs.
        real: (B, T) bool, False at padding; see `real_tokens`.
        image: (B, T) bool, True at image patches.
        arguments: a block's other keyword arguments (attention mask, rotary embeddings, positions).
        autocast: what blocks multiply matrices in (`torch.autocast`); None for the dtype of their weights.
        own: where blocks are of several types (some with a sliding window), the arguments of each block that differ
            from block 0's, by its number; empty where all blocks are given the same.
        reached: where in this block passes begin, see `reach`; empty: at its inputs.
    """

    hidden: Tensor
    real: Tensor
    image: Tensor
    arguments: Mapping[str, Any]
    autocast: torch.dtype | None = None
    own: tuple[Mapping[str, Any], ...] = ()
    reached: tuple[Reached, ...] = ()

    def arguments_of(self, block: Any) -> Mapping[str, Any]:
        """Keyword arguments of a block, which knows its number as transformers' attentions do."""
        return {**self.arguments, **self.own[block.self_attn.layer_idx]} if self.own else self.arguments

    def with_hidden(self, hidden: Tensor) -> "BlockBatch":
        """The same batch in front of the next block."""
        return replace(self, hidden=hidden, reached=())

    def widened(self) -> "BlockBatch":
        """The same in float32 where it is narrower: a block whose parameters are float32 then computes in that."""
        if self.hidden.dtype in (torch.float32, torch.float64):
            return self
        arguments, own = _widened(self.arguments), _widened(self.own)
        return replace(self, hidden=self.hidden.float(), arguments=arguments, own=own, reached=())

    def __len__(self) -> int:
        return len(self.hidden)

    def halves(self) -> tuple["BlockBatch", "BlockBatch"]:
        """The first half of the samples and the rest."""
        middle = len(self) // 2
        return self._rows(slice(middle)), self._rows(slice(middle, None))

    def _rows(self, rows: slice) -> "BlockBatch":
        arguments, own = (_rows_of(value, rows, len(self)) for value in (self.arguments, self.own))
        tensors: dict[str, Any] = {"hidden": self.hidden[rows], "real": self.real[rows], "image": self.image[rows]}
        reached = tuple(one.rows(rows) for one in self.reached)
        return replace(self, **tensors, arguments=arguments, own=own, reached=reached)


def _widened(argument: Any) -> Any:
    """A block's argument with its floating tensors in float32."""
    if isinstance(argument, tuple):
        return tuple(map(_widened, argument))
    if isinstance(argument, Mapping):
        return {name: _widened(item) for name, item in argument.items()}
    return argument.float() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def _rows_of(argument: Any, rows: slice, count: int) -> Any:
    """The part of blocks' arguments that belongs to these rows; what samples share stays whole."""
    if isinstance(argument, tuple):
        return tuple(_rows_of(item, rows, count) for item in argument)
    if isinstance(argument, Mapping):
        return {name: _rows_of(item, rows, count) for name, item in argument.items()}
    has_rows = isinstance(argument, Tensor) and argument.dim() > 1 and len(argument) == count
    return argument[rows] if has_rows else argument


class _StopForwardError(Exception):
    """Ends a forward pass once everything wanted has been seen."""


class _Witness(nn.Module):
    """Stands for a block: notes what it is given and hands its input on; the last one ends the pass."""

    def __init__(self, notes: list[tuple[Tensor, dict[str, Any]]], count: int) -> None:
        super().__init__()
        self.notes = notes
        self.count = count

    def forward(self, *positional: Tensor, **keywords: Any) -> Tensor:
        hidden: Tensor = positional[0] if positional else keywords.pop("hidden_states")
        self.notes.append((hidden, keywords | {"past_key_values": None, "use_cache": False}))
        if len(self.notes) == self.count:
            raise _StopForwardError
        return hidden


@torch.no_grad()
def first_block_batches(
    adapter: ModelAdapter,
    batches: Iterable[Mapping[str, Any]],
    autocast: torch.dtype | None = None,
    keep: Keep = in_memory,
) -> list[BlockBatch]:
    """Run embeddings, vision tower and projector, and catch what blocks are given; `keep` keeps what block 0 reads.

    Batches may lie anywhere: each is moved to the model's device. `autocast` is that of `BlockBatch`.
    """
    result = []
    count = len(adapter.blocks)
    for batch in (batch_on(adapter.device, batch) for batch in batches):
        notes: list[tuple[Tensor, dict[str, Any]]] = []
        with adapter.with_blocks([_Witness(notes, count) for _ in range(count)]), suppress(_StopForwardError):
            adapter.model(**model_inputs(batch, adapter.model.dtype, adapter.shortest_window), use_cache=False)
        hidden, arguments = notes[0]
        own = tuple(
            {name: value for name, value in given.items() if not _same(value, arguments[name])} for _, given in notes
        )
        real = real_tokens(batch)
        image = adapter.image_mask(batch["input_ids"]) & real
        result.append(BlockBatch(keep(hidden), real, image, arguments, autocast, own if any(own) else ()))
    return result


def _same(value: Any, other: Any) -> bool:
    """Whether two blocks are given the same; what holds tensors is the same if it is the very same object."""
    plain = isinstance(value, bool | int | float | str) and type(value) is type(other)
    return value is other or (plain and value == other)


def autocast_to(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[None]:
    """Inside, matrices are multiplied in this dtype; with None nothing changes."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def batch_on(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its tensors on this device; those that are there already are not copied."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def model_inputs(
    batch: Mapping[str, Any], dtype: torch.dtype = torch.float32, window: int | None = None
) -> dict[str, Tensor]:
    """The part of a collated batch that the forward of a model of this dtype takes.

    Raises:
        ConfigError: its conversations share an image and are longer than `window`, `ModelAdapter.shortest_window`.
    """
    refuse_short_windows(batch, window)
    inputs = {key: batch[key] for key in _MODEL_INPUTS if batch.get(key) is not None}
    if "branches" in batch:
        inputs["attention_mask"] = additive_mask(batch, dtype)
    return inputs


def run_block(block: nn.Module, batch: BlockBatch) -> Tensor:
    """The block's output (B, T, I), on the device of the block; inputs that were kept elsewhere are moved there."""
    inputs = batch.hidden.to(batch.real.device)
    reached = [one.on(inputs.device) for one in batch.reached]
    with autocast_to(batch.autocast, inputs.device), begun_at(block, reached):
        output = block(inputs, **batch.arguments_of(block))
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@torch.no_grad()
def run_blocks(block: nn.Module, batches: Sequence[BlockBatch], keep: Keep = in_memory) -> list[BlockBatch]:
    """Every batch one block further along."""
    return [batch.with_hidden(keep(in_halves(partial(run_block, block), batch, torch.cat))) for batch in batches]


@torch.no_grad()
def run_blocks_seeing(
    block: nn.Module, batches: Sequence[BlockBatch], names: Sequence[str], keep: Keep = in_memory
) -> tuple[list[BlockBatch], list[dict[str, Tensor]]]:
    """`run_blocks`, and on the way per batch what the named linears read at real tokens, each (real tokens, I)."""

    def run(batch: BlockBatch) -> tuple[Tensor, dict[str, Tensor]]:
        with _watched(block, names, partial(_at, batch.real)) as seen:
            return run_block(block, batch), seen

    def join(parts: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.cat([hidden for hidden, _ in parts]), _joined([seen for _, seen in parts])

    outputs, inputs = [], []
    for batch in batches:
        hidden, seen = in_halves(run, batch, join)
        outputs.append(batch.with_hidden(keep(hidden)))
        inputs.append({name: keep(tensor) for name, tensor in seen.items()})
    return outputs, inputs


@torch.no_grad()
def linear_inputs(block: nn.Module, batch: BlockBatch, names: Sequence[str]) -> dict[str, Tensor]:
    """Inputs of the named linears at real tokens, each (real tokens, I); the pass ends as soon as all are seen."""

    def run(batch: BlockBatch) -> dict[str, Tensor]:
        return _first_seen(block, batch, names, partial(_at, batch.real))

    return in_halves(run, batch, _joined)


@torch.no_grad()
def closing_linears_of(block: nn.Module, batches: Sequence[BlockBatch], names: Sequence[str]) -> dict[str, int | None]:
    """Which of the named linears `reach` can be asked for, seen on one sample; none where there is no batch."""
    if not batches:
        return {}
    sample = batches[0]._rows(slice(1))
    return closing_linears(block, names, partial(run_block, block, sample))


@torch.no_grad()
def reach(
    block: nn.Module, batches: Sequence[BlockBatch], name: str, others: int | None, keep: Keep = in_memory
) -> list[BlockBatch]:
    """The batches, their passes through this block from now on begun at the closing linear `name`.

    What comes before it in its submodule must not change any more. `others` is what `closing_linears_of` says of it;
    `keep` keeps what it reads.
    """

    def run(batch: BlockBatch) -> dict[str, Tensor]:
        return _first_seen(block, batch, [name], lambda inputs: inputs)

    inputs = (keep(in_halves(run, batch, _joined)[name]) for batch in batches)
    return [
        replace(batch, reached=(*batch.reached, Reached(name, kept, others)))
        for batch, kept in zip(batches, inputs, strict=True)
    ]


def _first_seen(
    block: nn.Module, batch: BlockBatch, names: Sequence[str], part: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """A part of what each of the named linears reads; the pass ends as soon as all are seen."""
    with _watched(block, names, part, stop=True) as seen, suppress(_StopForwardError):
        run_block(block, batch)
    return seen


def _at(real: Tensor, inputs: Tensor) -> Tensor:
    return inputs[real]


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What was seen of the halves of a batch, one after the other."""
    return {name: torch.cat([seen[name] for seen in parts]) for name in parts[0]}


@contextmanager
def _watched(
    block: nn.Module, names: Sequence[str], part: Callable[[Tensor], Tensor], *, stop: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Inside, a part of what each of the named linears reads is noted; with `stop` the last of them ends the pass."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, positional: tuple[Tensor, ...]) -> None:
            seen[name] = part(positional[0])
            if stop and len(seen) == len(names):
                raise _StopForwardError

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
