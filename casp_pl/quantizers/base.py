"""What every quantizer offers: a weight and a second moment in, a layer out, its true cost known beforehand."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from casp_pl.errors import ConfigError, InputError
from casp_pl.layers.base import QuantizedLinear
from casp_pl.layers.build import build_layer
from casp_pl.linalg.finite import require_finite

__all__ = ["Quantizer"]


class Quantizer(ABC):
    """A method with its settings, keyword-only arguments of the constructor, so that one object serves a whole model.

    Attributes:
        name: what plans and reports call it.
        levels: the bits per weight it can do, ascending.
        layer: the class of layer that it returns.
        rank_grain: ranks of low-rank factors are rounded down to a multiple of it.
    """

    name: ClassVar[str]
    levels: ClassVar[tuple[int, ...]]
    layer: ClassVar[type[QuantizedLinear]]
    rank_grain: int

    @abstractmethod
    def quantize(
        self,
        weight: Tensor,
        second_moment: Tensor,
        *,
        bits: int,
        bias: Tensor | None = None,
        generator: torch.Generator | None = None,
        together: bool = False,
    ) -> QuantizedLinear:
        """The layer whose output on inputs with this second moment is close to that of `weight`.

        Args:
            weight: (O, I).
            second_moment: (I, I), the sum or mean of x x^T over the layer's inputs; its scale does not matter.
            bits: one of `levels`.
            bias: (O,), kept as it is.
            generator: source of every random choice but those that linears of one input share; without one a fresh
                generator with a fixed seed is used.
            together: every process of the run makes this call, with the same arguments, and searches the codes of some
                rows; all return the whole layer.

        Raises:
            ConfigError: the method cannot do `bits`.
            InputError: the shapes do not fit each other.
            NumericsError: the weight or the second moment holds NaN or infinity.
        """

    def for_module(self, name: str) -> "Quantizer":
        """The quantizer of the linear with this full name: this one, unless a setting goes by names.

        Everything that knows the name of what it quantizes, or of what it states the cost of, asks for it.
        """
        return self

    def check_names(self, names: Sequence[str]) -> None:
        """Passes silently where settings that go by names fit a model whose linears have these full names.

        Raises:
            ConfigError: one of them is of no linear.
        """
        return

    def layer_spec(self, out_features: int, in_features: int, *, bits: int, bias: bool = False) -> dict[str, Any]:
        """What `spec()` of the layer that `quantize` returns will say. `build_layer` makes the empty layer from it.

        Raises:
            ConfigError: the method cannot do `bits`.
        """
        self._check_bits(bits)
        common = {"kind": self.layer.kind, "in_features": in_features, "out_features": out_features, "bias": bias}
        return common | self._structure(out_features, in_features, bits)

    @abstractmethod
    def _structure(self, out_features: int, in_features: int, bits: int) -> dict[str, Any]:
        """What `structure()` of that layer will say."""

    def storage_bits(self, out_features: int, in_features: int, *, bits: int) -> int:
        """Bits that such a weight takes in all: codes, codebooks, scales and zeros."""
        return int(self._skeleton(out_features, in_features, bits).storage_bits)

    def code_bits(self, out_features: int, in_features: int, *, bits: int) -> int:
        """Bits of its codes alone."""
        return int(self._skeleton(out_features, in_features, bits).code_bits)

    def _skeleton(self, out_features: int, in_features: int, bits: int) -> QuantizedLinear:
        layer = build_layer(self.layer_spec(out_features, in_features, bits=bits), device="meta")
        assert isinstance(layer, QuantizedLinear)
        return layer

    def _check_bits(self, bits: int) -> None:
        if bits not in self.levels:
            raise ConfigError(f"{self.name} cannot do {bits} bits: choose one of {', '.join(map(str, self.levels))}")

    def _check_inputs(self, weight: Tensor, second_moment: Tensor, bits: int) -> None:
        """Raises what `quantize` promises to raise."""
        self._check_bits(bits)
        width = weight.shape[-1]
        if weight.dim() != 2 or second_moment.shape != (width, width):
            shapes = f"{tuple(weight.shape)} and {tuple(second_moment.shape)}"
            raise InputError(f"a weight (O, I) needs a second moment (I, I), got {shapes}")
        for name, tensor in (("weight", weight), ("second moment", second_moment)):
            require_finite(tensor, name)
