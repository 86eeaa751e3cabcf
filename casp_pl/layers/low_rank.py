"""Linear layer whose weight is a product of two thin ones (method of CASP, arXiv 2503.05936, for W_q and W_k).

Letters: O out, I in, R rank.
"""

from typing import Any

from torch import Tensor, nn

from casp_pl.layers.base import STORED_FLOAT_BITS, QuantizedLinear, round_to_float16

__all__ = ["LowRankLinear"]


class LowRankLinear(nn.Module):
    """y = output_factor(input_factor(x)), that is W = A B with A (O, R) and B (R, I).

    Args:
        input_factor: holds B, without bias; a `QuantizedLinear`, or an `nn.Linear` that is stored in 16 bits.
        output_factor: holds A and the bias of the layer; likewise.
    """

    kind = "low_rank"

    def __init__(
        self, *, input_factor: nn.Linear | QuantizedLinear, output_factor: nn.Linear | QuantizedLinear
    ) -> None:
        super().__init__()
        if input_factor.out_features != output_factor.in_features or input_factor.bias is not None:
            raise ValueError(
                f"factors do not fit: the first has {input_factor.out_features} outputs and must have no bias,"
                f" the second {output_factor.in_features} inputs"
            )
        self.input_factor = input_factor
        self.output_factor = output_factor

    def forward(self, x: Tensor) -> Tensor:
        """X (..., I) -> (..., O)."""
        y: Tensor = self.output_factor(self.input_factor(x))
        return y

    def dequantize(self) -> Tensor:
        """The product A B (O, I), differentiable with respect to what the factors train."""
        return _weight(self.output_factor) @ _weight(self.input_factor)

    @property
    def rank(self) -> int:
        """R."""
        return self.input_factor.out_features

    @property
    def in_features(self) -> int:
        """I."""
        return self.input_factor.in_features

    @property
    def out_features(self) -> int:
        """O."""
        return self.output_factor.out_features

    @property
    def bias(self) -> Tensor | None:
        """(O,), that of the output factor."""
        return self.output_factor.bias

    @property
    def weight_count(self) -> int:
        """O * I, the weights of the dense layer, not of the factors."""
        return self.out_features * self.in_features

    @property
    def code_bits(self) -> int:
        """Bits of both factors' codes; a dense factor's weights count as its codes."""
        return sum(_dense_bits(part) if isinstance(part, nn.Linear) else part.code_bits for part in self._factors)

    @property
    def storage_bits(self) -> int:
        """Bits of everything that is stored for both factors. The bias is not counted."""
        return sum(_dense_bits(part) if isinstance(part, nn.Linear) else part.storage_bits for part in self._factors)

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
            "rank": self.rank,
            "input_factor": _spec(self.input_factor),
            "output_factor": _spec(self.output_factor),
        }

    def round_to_storage(self) -> None:
        """Rounds the factors in place to what a file holds, so that a reloaded layer is bit-equal to this one.

        Raises:
            NumericsError: a value is NaN or beyond the range of float16.
        """
        for factor in self._factors:
            if isinstance(factor, QuantizedLinear):
                factor.round_to_storage()
            else:
                round_to_float16(factor.weight, f"a factor ({factor.out_features} x {factor.in_features})")

    @property
    def _factors(self) -> tuple[nn.Linear | QuantizedLinear, nn.Linear | QuantizedLinear]:
        return self.input_factor, self.output_factor


def _dense_spec(layer: nn.Linear) -> dict[str, Any]:
    """The spec of a dense layer."""
    return {
        "kind": "dense",
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
    }


def _spec(factor: nn.Linear | QuantizedLinear) -> dict[str, Any]:
    return _dense_spec(factor) if isinstance(factor, nn.Linear) else factor.spec()


def _dense_bits(factor: nn.Linear) -> int:
    return STORED_FLOAT_BITS * factor.weight.numel()


def _weight(factor: nn.Linear | QuantizedLinear) -> Tensor:
    return factor.weight if isinstance(factor, nn.Linear) else factor.dequantize()
