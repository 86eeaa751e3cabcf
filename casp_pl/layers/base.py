"""The linear layer whose weight is kept compressed. Letters: O out, I in, N tokens."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from casp_pl.errors import NumericsError
from casp_pl.layers.product import linear
from casp_pl.processes import mean_of_all

__all__ = ["STORED_FLOAT_BITS", "QuantizedLinear", "output_dtype", "round_to_float16"]

STORED_FLOAT_BITS = 16


class QuantizedLinear(nn.Module, ABC):
    """y = x W^T + bias with W (O, I) rebuilt from codes and a few trainable tables.

    Codes are uint8 buffers, packed as they are stored. Tables are Parameters: float32 in memory, float16 in a file,
    which loses nothing after `round_to_storage`.

    Args:
        in_features: I.
        out_features: O.
        bias: whether there is a bias (O,).
        device: where the tensors are made; None for torch's default.
        dtype: of the tables and the bias.

    Attributes:
        collect_weight_gradient: while True, every backward pass adds the gradient of the dequantized weight to
            `weight_gradient`, also where no table is trained. For the codes' step of PV-tuning (arXiv 2405.14852).
        weight_gradient: the sum of gradients so far, and of their squares (2, O, I); None before the first backward
            pass. Its reader sets it back to None.
    """

    kind: ClassVar[str]
    bias: nn.Parameter | None

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.collect_weight_gradient = False
        self.weight_gradient: Tensor | None = None
        self._keeps_dense = False
        self._dense: Tensor | None = None

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The weight (O, I), differentiable with respect to the tables."""

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """X (..., I) -> x W^T + bias (..., O) by the way that is fastest for this kind of codes; differentiable."""

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits of the codes alone."""

    @property
    @abstractmethod
    def storage_bits(self) -> int:
        """Bits of everything that is stored for the weight: codes and tables. The bias is not counted."""

    @abstractmethod
    def tables(self) -> dict[str, nn.Parameter]:
        """The trainable tensors that `dequantize` reads, by name."""

    @abstractmethod
    def structure(self) -> dict[str, Any]:
        """The constructor's arguments that this kind of layer adds to the common ones."""

    @abstractmethod
    def free_cache(self) -> None:
        """Gives back memory that only saves time. The next use fills it again."""

    def forward(self, x: Tensor) -> Tensor:
        """X (..., I) -> (..., O)."""
        collect = self.collect_weight_gradient and torch.is_grad_enabled()
        if not (self._keeps_dense or collect):
            return self.multiply(x)
        weight = self._dense_weight(x)
        if collect:
            weight = weight if weight.requires_grad else weight.detach().requires_grad_()
            weight.register_hook(self._add_weight_gradient)  # type: ignore[no-untyped-call]
        return linear(x, weight, self.bias)

    @property
    def weight_count(self) -> int:
        """O * I, the weights of the dense layer."""
        return self.out_features * self.in_features

    @property
    def bits_per_weight_codes(self) -> float:
        """`code_bits` per weight of the dense layer."""
        return self.code_bits / self.weight_count

    @property
    def bits_per_weight(self) -> float:
        """`storage_bits` per weight of the dense layer."""
        return self.storage_bits / self.weight_count

    @property
    def nbytes(self) -> int:
        """Whole bytes that the weight takes in a file."""
        return -(-self.storage_bits // 8)

    def spec(self) -> dict[str, Any]:
        """Everything but the numbers, as JSON. `build_layer` makes the same layer, empty, from it."""
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            **self.structure(),
        }

    def round_to_storage(self) -> None:
        """Rounds the tables in place to what a file holds, so that a reloaded layer is bit-equal to this one.

        Raises:
            NumericsError: a value is NaN or beyond the range of float16.
        """
        for name, table in self.tables().items():
            round_to_float16(table, f"{name} ({self.kind}, {self.out_features} x {self.in_features})")

    def materialize(self) -> None:
        """From the next forward pass on keeps the dense weight, without gradient, as narrow as x, until `release`."""
        self._keeps_dense = True

    def release(self) -> None:
        """Frees the dense weight; the next forward pass is made from the codes."""
        self._keeps_dense, self._dense = False, None

    @property
    def is_materialized(self) -> bool:
        """Whether a dense weight is kept, or will be from the next forward pass on."""
        return self._keeps_dense

    def output_of(self, products: Tensor, x: Tensor) -> Tensor:
        """Products (N, O) of x (..., I) in float32 -> the layer's output (..., O) in the dtype that F.linear gives."""
        y = products if self.bias is None else products + self.bias
        return y.to(output_dtype(x)).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The spec in one line, as `print(model)` shows it."""
        return ", ".join(f"{key}={value}" for key, value in self.spec().items() if key != "kind")

    def _dense_weight(self, x: Tensor) -> Tensor:
        """The weight; a kept one is rounded once to the dtype of a model that is narrower than the tables."""
        if not self._keeps_dense:
            return self.dequantize()
        narrow = not torch.is_autocast_enabled(x.device.type)
        if self._dense is None or (narrow and self._dense.dtype != x.dtype):
            with torch.inference_mode(False), torch.no_grad():
                dense = self.dequantize()
                self._dense = dense.to(x.dtype) if narrow else dense
        return self._dense

    def _add_weight_gradient(self, gradient: Tensor) -> None:
        gradient = mean_of_all(gradient.detach())  # of the whole batch, as it would be in one process
        if self.weight_gradient is None:
            self.weight_gradient = torch.stack([gradient, gradient.square()])
        else:
            self.weight_gradient[0] += gradient
            self.weight_gradient[1].addcmul_(gradient, gradient)


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype of what F.linear makes of x: autocast's where it is enabled."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@torch.no_grad()
def round_to_float16(tensor: Tensor, name: str) -> None:
    """Rounds a tensor in place to the nearest values that float16 holds; its dtype stays.

    Raises:
        NumericsError: a value is NaN or beyond the range of float16.
    """
    rounded = tensor.to(torch.float16)
    broken = rounded.numel() - int(rounded.isfinite().sum())
    if broken:
        raise NumericsError(
            f"{broken} of {rounded.numel()} values of {name} are NaN or beyond float16: lower the learning rate"
        )
    tensor.copy_(rounded)
