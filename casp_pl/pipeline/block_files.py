"""Compressed blocks, and the finished linears of one that is not, as artifacts of a run."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, overload

import torch
from torch import nn

from casp_pl.checkpoint import RunDirectory
from casp_pl.layers import build_layer
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.compress import LinearReport
from casp_pl.models.sharing import Layer
from casp_pl.models.stored_blocks import LentBlock
from casp_pl.models.surgery import block_from_tensors, layer_specs, round_to_storage

__all__ = [
    "LINEARS",
    "BlockFiles",
    "LinearFiles",
    "block_name",
    "finished_blocks",
    "load_block",
    "runnable",
    "save_block",
]

LINEARS = "linears"  # the folder of the finished linears of a block that is not finished


def block_name(folder: str, number: int) -> str:
    """The artifact of a block."""
    return f"{folder}/{number:03d}.safetensors"


def save_block(run: RunDirectory, name: str, block: nn.Module, **notes: Any) -> None:
    """One block as safetensors: its tensors, and in the metadata what layers it is made of."""
    metadata = {"layers": json.dumps(layer_specs(block)), "notes": json.dumps(notes)}
    run.write_tensors(name, dict(block.state_dict()), metadata)


def load_block(run: RunDirectory, name: str, adapter: ModelAdapter, number: int) -> tuple[nn.Module, dict[str, Any]]:
    """The block of a file and its notes."""
    tensors, metadata = run.read_tensors(name)
    block = block_from_tensors(adapter.skeleton(number), json.loads(metadata["layers"]), tensors, adapter.device)
    return block, json.loads(metadata["notes"])


class BlockFiles(Sequence[nn.Module]):
    """The compressed blocks of a folder; each is read when it is asked for, and belongs to who asks.

    Args:
        run: where they lie.
        folder: `blocks`, `tuned` or `end_to_end`.
        adapter: the original model, whose blocks have their structure.
        rounded: whether tables are as a model is stored, in float16, or as training left them, for more training.
    """

    def __init__(self, run: RunDirectory, folder: str, adapter: ModelAdapter, *, rounded: bool = True) -> None:
        self.run = run
        self.folder = folder
        self.adapter = adapter
        self.rounded = rounded

    def as_trained(self) -> "BlockFiles":
        """The same, not rounded."""
        return BlockFiles(self.run, self.folder, self.adapter, rounded=False)

    def __len__(self) -> int:
        return len(self.adapter.blocks)

    @overload
    def __getitem__(self, number: int) -> nn.Module: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[nn.Module]: ...

    def __getitem__(self, number: int | slice) -> nn.Module | Sequence[nn.Module]:
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        place = range(len(self))[number]
        block, _ = load_block(self.run, block_name(self.folder, place), self.adapter, place)
        if self.rounded:
            round_to_storage(block)
        return block


def finished_blocks(run: RunDirectory, folder: str, adapter: ModelAdapter) -> BlockFiles | None:
    """All blocks of a folder, or None while one is missing."""
    names = [block_name(folder, number) for number in range(len(adapter.blocks))]
    return BlockFiles(run, folder, adapter) if all(run.has(name) for name in names) else None


def runnable(blocks: Sequence[nn.Module], adapter: ModelAdapter) -> Sequence[nn.Module]:
    """What stands in the model for these blocks: themselves, or what reads one after the other if it is streamed."""
    if adapter.stored is None or not isinstance(blocks, BlockFiles):
        return blocks
    return [LentBlock(adapter.skeleton(number), partial(blocks.__getitem__, number)) for number in range(len(blocks))]


class LinearFiles:
    """The finished linears of a block that is being compressed (`casp_pl.models.compress.FinishedLinears`).

    At a 70B model a block takes an hour: a run that is killed goes on at the linear where it was.

    Args:
        run: where they are kept.
        number: of the block.
        device: where linears are put.
    """

    def __init__(self, run: RunDirectory, number: int, device: torch.device) -> None:
        self.run = run
        self.folder = f"{LINEARS}/{number:03d}"
        self.device = device

    def find(self, name: str) -> tuple[Layer, LinearReport] | None:
        """The linear and its report; None if it is not done."""
        if not self.run.has(self._file(name)):
            return None
        tensors, metadata = self.run.read_tensors(self._file(name))
        layer: Any = build_layer(metadata["layer"], device="meta")
        layer.load_state_dict(tensors, assign=True)
        return layer.to(self.device), LinearReport(**metadata["report"])

    def add(self, name: str, layer: Layer, report: LinearReport) -> None:
        """Keep a linear."""
        self.run.write_tensors(self._file(name), layer.state_dict(), {"layer": layer.spec(), "report": asdict(report)})

    def discard(self) -> None:
        """The block is complete: nobody needs its linears any more."""
        self.run.discard(self.folder)

    def _file(self, name: str) -> str:
        return f"{self.folder}/{name}.safetensors"
