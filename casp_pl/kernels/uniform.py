"""Uniform (RTN, GPTQ) weights: integer codes on a grid of its own for every group of a row.

    W[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g],  g = i // D         (GPTQ, arXiv 2210.17323, section 4)

Letters: O out, I in, G groups a row (the last may be short), D group length.
"""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["dequantize_uniform", "uniform_steps"]


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
