"""Dense weights for a while: evaluation reads each weight many times and trains none."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from casp_pl.layers.base import QuantizedLinear

__all__ = ["materialized"]


@contextmanager
def materialized(model: nn.Module) -> Iterator[None]:
    """Inside, every `QuantizedLinear` of the model computes with a dense copy of its weight, which trains nothing.

    Layers that are materialized already stay so afterwards, so the context nests. A layer whose codes are replaced
    inside goes back to dequantizing.
    """
    every = (module for module in model.modules() if isinstance(module, QuantizedLinear))
    layers = [layer for layer in every if not layer.is_materialized]
    try:
        for layer in layers:
            layer.materialize()
        yield
    finally:
        for layer in layers:
            layer.release()
