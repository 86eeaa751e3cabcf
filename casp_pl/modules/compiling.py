"""torch.compile for the blocks of a compressed model: what lies between its linears becomes one kernel or a few."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

from casp_pl.layers import QuantizedLinear

__all__ = ["CompiledBlocks"]


class CompiledBlocks:
    """The forward passes of blocks, compiled at their first call.

    Args:
        blocks: of the model; none are touched outside `active`.
        backend: of torch.compile, such as `inductor`.
    """

    def __init__(self, blocks: Iterable[nn.Module], backend: str) -> None:
        _leave_linears_alone()
        self._forwards = [(block, torch.compile(block.forward, backend=backend, dynamic=True)) for block in blocks]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, blocks run what was compiled."""
        for block, forward in self._forwards:
            block.forward = forward
        try:
            yield
        finally:
            for block, _ in self._forwards:
                del block.forward  # what the class defines shows again


@cache
def _leave_linears_alone() -> None:
    """Compressed linears run kernels of their own, which torch.compile could only take apart.

    Here, once a process, and not where the class is defined: the decorator imports for two seconds.
    """
    QuantizedLinear.forward = torch.compiler.disable(QuantizedLinear.forward)  # type: ignore[method-assign,no-untyped-call]
