"""Percentile bootstrap over images (Efron 1979): questions of one image are not independent, images are.

Shapes: N questions, G images, B resamples.
"""

import torch
from torch import Tensor

__all__ = ["interval", "resampled_means"]

_AT_ONCE = 4_000_000  # drawn numbers that lie in memory together


def resampled_means(values: Tensor, image: Tensor, *, resamples: int, seed: int) -> Tensor:
    """(B,) means over the questions of G images drawn with replacement, in float64 on the CPU.

    Args:
        values: (N,) one number a question; differences of two models for a paired comparison.
        image: (N,) the number of each question's image.
        resamples: B.
        seed: the same seed draws the same images, so two models see the same resamples.
    """
    _, group = torch.unique(image.cpu(), return_inverse=True)
    asked = torch.bincount(group).double()
    sums = torch.bincount(group, weights=values.cpu().double())
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _AT_ONCE // len(asked))
    means = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = torch.randint(len(asked), (count, len(asked)), generator=generator)
        means.append(sums[drawn].sum(1) / asked[drawn].sum(1))
    return torch.cat(means)


def interval(means: Tensor, confidence: float) -> tuple[float, float]:
    """The middle share of (B,) resampled means: low and high end."""
    tail = (1 - confidence) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return low, high
