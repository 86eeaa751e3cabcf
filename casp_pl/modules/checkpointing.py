"""Activation checkpointing of blocks (Chen et al., arXiv 1604.06174): memory for time."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpointed"]


@contextmanager
def checkpointed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """A forward pass inside keeps only the blocks' inputs; its backward pass, inside or later, computes the rest again.

    transformers' own switch does nothing in evaluation mode, in which compressed models are trained: no dropout.
    """
    chosen = [(block, vars(block).get("forward")) for block in blocks]
    for block, _ in chosen:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, before in chosen:
            del block.forward  # what the class defines shows again
            if before is not None:
                block.forward = before
