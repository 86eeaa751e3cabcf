"""Every compressed layer as the dense linear that it stands for."""

from typing import Any

import torch
from torch import Tensor, nn

from casp_pl.models.surgery import compressed_layers

__all__ = ["to_dense"]


@torch.no_grad()
def to_dense(model: Any) -> None:
    """Replace compressed layers by `nn.Linear`, in place; low-rank factors are multiplied out."""
    for name, layer in compressed_layers(model).items():
        model.set_submodule(name, _linear(layer.dequantize(), layer.bias))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
