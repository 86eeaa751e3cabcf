"""Uniform (RTN, GPTQ) weights: integer codes on a grid of its own for every group of a row.

    W[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g],  g = i // D         (GPTQ, arXiv 2210.17323, section 4)

Letters: O out, I in, G groups a row (the last may be short), D group length.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from casp_pl.kernels.compiled import weight_loops
from casp_pl.kernels.packing import unpack

__all__ = ["UniformCodes", "byte_codebook", "bytes_of_codes", "codes_per_byte", "dequantize_uniform"]

_BYTE = 8
_UNIT = 8  # codes that fill whole bytes, whatever their bits


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


class UniformCodes(NamedTuple):
    """The codes of some rows as they are stored.

    Attributes:
        packed: codes (O, I) packed at `bits` bits, flat uint8.
        zeros: zero points (O, G), uint8.
        bits: of a code.
        group_size: D.
        in_features: I.
    """

    packed: Tensor
    zeros: Tensor
    bits: int
    group_size: int
    in_features: int


def dequantize_uniform(codes: UniformCodes, scales: Tensor) -> Tensor:
    """The weight (O, I) in the dtype of the scales (O, G), differentiable with respect to them, once."""
    weight: Tensor = _Dequantize.apply(scales, codes)  # type: ignore[no-untyped-call]
    return weight


class _Dequantize(torch.autograd.Function):
    """Keeps nothing but the packed codes: to decode them again costs less than to keep numbers of 16 or 32 bits."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, codes: UniformCodes) -> Tensor:
        ctx.codes = codes
        return _weight(codes, scales)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        codes: UniformCodes = ctx.codes
        steps = _weight(codes, torch.ones_like(codes.zeros, dtype=gradient.dtype))
        return _grouped(steps.mul_(gradient), codes.group_size).sum(dim=2), None


def _weight(codes: UniformCodes, scales: Tensor) -> Tensor:
    whole_units = codes.in_features % _UNIT == codes.group_size % _UNIT == 0
    if whole_units and (loops := weight_loops(scales.device, scales.dtype)) is not None:
        weight = torch.empty(len(scales), codes.in_features, dtype=torch.float32, device=scales.device)
        packed = F.pad(codes.packed, (0, loops.ahead))
        loops.uniform(packed, codes.bits, codes.zeros.float(), scales.float(), codes.group_size, weight)
        return weight.to(scales.dtype)
    numbers = unpack(codes.packed, len(scales) * codes.in_features, codes.bits).view(len(scales), -1)
    steps = _grouped(numbers, codes.group_size).to(scales.dtype) - codes.zeros.unsqueeze(-1)
    return steps.mul_(scales.unsqueeze(-1)).flatten(1)[:, : codes.in_features]


def _grouped(numbers: Tensor, group_size: int) -> Tensor:
    """(O, I) -> (O, G, D), the places after I filled with zeros."""
    return F.pad(numbers, (0, -numbers.shape[1] % group_size)).view(len(numbers), -1, group_size)
