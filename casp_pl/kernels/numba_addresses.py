"""Tensors as numbers: to make numpy's arrays of them takes longer than the product with a small matrix."""

from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

__all__ = ["addresses", "contiguous", "pointer"]

_intrinsic: Any = intrinsic  # what it makes is called with one argument less than mypy believes


def contiguous(*tensors: Tensor) -> list[Tensor]:
    """Tensors whose addresses are good for as long as they are kept."""
    return [tensor.contiguous() for tensor in tensors]


def addresses(dtypes: tuple[torch.dtype, ...], *tensors: Tensor) -> list[int]:
    """Where tensors begin.

    Args:
        dtypes: what the loop takes to be there, tensor by tensor.
        tensors: those that it reads, and that it writes.

    Raises:
        TypeError: something else is there, or not in this memory. The loop would read, and write, what is beyond it.
    """
    if tuple([tensor.dtype for tensor in tensors if tensor.is_cpu]) != dtypes:
        found = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in tensors)
        raise TypeError(f"this loop takes {', '.join(map(str, dtypes))} on the CPU, not {found}")
    return [tensor.data_ptr() for tensor in tensors]


@_intrinsic
def pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """Inside compiled code: an address as numba's `carray` takes it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), generate
