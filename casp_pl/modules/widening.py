"""Training of a model in 16 bits: what is trained, and what flows between blocks, is float32 meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

__all__ = ["widened"]

_NARROW = (torch.float16, torch.bfloat16)


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """Inside, parameters and buffers of 16 bits are float32; afterwards they are rounded back to what they were.

    Adam's squares of gradients are below what float16 holds, and its steps below the last bit of bfloat16. Compressed
    weights take no more memory by it: their codes are bytes, and their tables are float32 anyway.
    """
    tensors = chain(module.parameters(), module.buffers())
    narrow = [(tensor, tensor.dtype) for tensor in tensors if tensor.dtype in _NARROW]
    for tensor, _ in narrow:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)
