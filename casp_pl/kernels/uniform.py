"""Uniform (RTN, GPTQ) weights: integer codes on a grid of its own for every group of a row.

    W[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g],  g = i // D         (GPTQ, arXiv 2210.17323, section 4)

Letters: O out, I in, G groups a row (the last may be short), D group length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["byte_codebook", "bytes_of_codes", "codes_per_byte", "dequantize_uniform", "uniform_steps"]

_BYTE = 8


def codes_per_byte(bits: int) -> int:
    """How many neighbouring codes of `bits` bits are looked up as one byte."""
    return _BYTE // bits


def byte_codebook(bits: int) -> Tensor:
    """The codes that a byte stands for (1, C, `codes_per_byte`), float32."""
    count = codes_per_byte(bits)
    entries = torch.arange(1 << bits * count, device="cpu")
    return (entries[:, None] >> torch.arange(count, device="cpu") * bits & (1 << bits) - 1).float().unsqueeze(0)


def bytes_of_codes(codes: Tensor, bits: int, group_size: int) -> Tensor:
    """Bytes of neighbouring codes, every group filled up with zeros: codes (O, I) -> uint8 (O, bytes of all groups)."""
    count = codes_per_byte(bits)
    padded = F.pad(codes, (0, -codes.shape[1] % group_size)).view(len(codes), -1, group_size)
    filled = F.pad(padded, (0, -group_size % count))
    parts = filled.view(*filled.shape[:2], -1, count).int()
    places = torch.arange(count, dtype=torch.int32, device=codes.device) * bits
    packed: Tensor = (parts << places).sum(dim=3)
    return packed.to(torch.uint8).flatten(1)


def uniform_steps(codes: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """Whole steps of every weight from its zero point, as int16.

    Args:
        codes: integers (O, I).
        zeros: integers (O, G).
        group_size: D.

    Returns:
        (O, G, D), the places after I filled with codes of zero.
    """
    groups = zeros.shape[1]
    padded = F.pad(codes.short(), (0, groups * group_size - codes.shape[1]))
    return padded.view(-1, groups, group_size) - zeros.short().unsqueeze(-1)


def dequantize_uniform(steps: Tensor, scales: Tensor, in_features: int) -> Tensor:
    """Weight of uniform codes, differentiable with respect to the scales: steps (O, G, D), scales (O, G) -> (O, I)."""
    return (steps.to(scales.dtype) * scales.unsqueeze(-1)).flatten(1)[:, :in_features]
