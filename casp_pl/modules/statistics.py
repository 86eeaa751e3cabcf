"""What one pass of the original model tells about each block (method A): what ranks and bits are chosen by."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CalibrationStatistics"]


@dataclass(frozen=True)
class CalibrationStatistics:
    """Statistics of L blocks.

    Attributes:
        block_influence: (L,) 1 - mean cosine between a block's input and output tokens (ShortGPT).
        spectra: full name of a low-rank candidate -> its whitened singular values, descending.
        attention_sparsity: (L, 2, 2) share of attention probabilities below the threshold; query text/image x key
            text/image; NaN where no such pair was seen.
        head_sparsity: (L, heads, 2, 2) the same for each attention head; None in files of earlier versions.
        rounding: full name of a linear -> relative proxy loss of a quick rounding; empty unless asked for.
        sensitivity: full name of a linear -> nats of KL that rounding it costs, over 2^(-2 b) at b bits; empty unless
            asked for.
        tokens: real tokens seen.
        image_tokens: of these, image patches.
    """

    block_influence: Tensor
    spectra: dict[str, Tensor]
    attention_sparsity: Tensor
    rounding: dict[str, float]
    sensitivity: dict[str, float]
    tokens: int
    image_tokens: int
    head_sparsity: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Everything as tensors, for one safetensors file."""
        result = {"block_influence": self.block_influence, "attention_sparsity": self.attention_sparsity}
        if self.head_sparsity is not None:
            result["head_sparsity"] = self.head_sparsity
        result["tokens"] = torch.tensor([self.tokens, self.image_tokens])
        result |= {f"spectrum.{name}": value for name, value in self.spectra.items()}
        for kind, figures in (("rounding", self.rounding), ("sensitivity", self.sensitivity)):
            result |= {f"{kind}.{name}": torch.tensor(value) for name, value in figures.items()}
        return result

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "CalibrationStatistics":
        """The inverse of `tensors`."""
        tokens, image_tokens = tensors["tokens"].tolist()
        return cls(
            block_influence=tensors["block_influence"],
            spectra=_with_prefix(tensors, "spectrum."),
            attention_sparsity=tensors["attention_sparsity"],
            rounding=_numbers(tensors, "rounding."),
            sensitivity=_numbers(tensors, "sensitivity."),
            tokens=tokens,
            image_tokens=image_tokens,
            head_sparsity=tensors.get("head_sparsity"),
        )


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _numbers(tensors: dict[str, Tensor], prefix: str) -> dict[str, float]:
    return {name: value.item() for name, value in _with_prefix(tensors, prefix).items()}
