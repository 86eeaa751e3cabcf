"""Passes through a block that begin where earlier ones have been: attention is the dearest part, and computed once.

Of a linear that closes a submodule, whose output is the submodule's (o_proj of an attention, down_proj of an MLP), the
submodule needs no more than what the linear reads. Shapes: B batch, T sequence, I in_features, O out_features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Reached", "begun_at", "closing_linears"]


@dataclass(frozen=True)
class Reached:
    """What a closing linear reads in one batch.

    Attributes:
        linear: its name relative to the block.
        inputs: (B, T, I).
        others: how many Nones its submodule gives beside its output, in a tuple; None where it gives the output alone.
    """

    linear: str
    inputs: Tensor
    others: int | None

    def rows(self, rows: slice) -> "Reached":
        """Of these samples."""
        return replace(self, inputs=self.inputs[rows])

    def on(self, device: torch.device) -> "Reached":
        """The same on this device."""
        return replace(self, inputs=self.inputs.to(device))

    def output(self, block: nn.Module) -> Any:
        """What the submodule gives now, with the linear that the block has now."""
        output = block.get_submodule(self.linear)(self.inputs)
        return output if self.others is None else (output, *[None] * self.others)


def closing_linears(block: nn.Module, names: Sequence[str], run: Callable[[], Any]) -> dict[str, int | None]:
    """Those of the named linears that close a submodule of the block, each with its `Reached.others`.

    Args:
        block: the block.
        names: relative to it.
        run: passes something through it.
    """
    given: dict[str, tuple[Any, int | None]] = {}  # with the version, which every change in place raises

    def note(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            given[name] = output, getattr(output, "_version", None)

        return hook

    watched = {*names, *filter(None, map(_parent, names))}
    handles = [block.get_submodule(name).register_forward_hook(note(name)) for name in watched]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    closing: dict[str, int | None] = {}
    for name in names:
        own, version = given[name]
        output, _ = given.get(_parent(name), (None, None))
        first, *others = output if isinstance(output, tuple) else (output,)
        if first is own and own._version == version and all(other is None for other in others):
            closing[name] = len(others) if isinstance(output, tuple) else None
    return closing


@contextmanager
def begun_at(block: nn.Module, reached: Sequence[Reached]) -> Iterator[None]:
    """Inside, submodules of the block whose closing linears were reached compute no more than these."""
    parents = {block.get_submodule(_parent(one.linear)): one for one in reached}
    before = {parent: vars(parent).get("forward") for parent in parents}
    for parent, one in parents.items():
        parent.forward = lambda *_, one=one, **__: one.output(block)
    try:
        yield
    finally:
        for parent, forward in before.items():
            del parent.forward
            if forward is not None:
                parent.forward = forward


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
