"""Additive (AQLM) weights: every group of D weights is the sum of K codebook entries, times the scale of its row.

    W[o, gD : (g+1)D] = scales[o] * sum_k codebooks[k, codes[o, g, k]]        (AQLM, arXiv 2401.06118, section 3.1)

Letters: O out, G groups a row, K codebooks, C entries a codebook, D group length.

Both directions are sums over bags of rows, which `embedding_bag` does in one pass and in a fixed order: forward over
the K entries of a group, backward over the groups that share an entry, found by one stable sort of the codes. The
sort outlives the call in an `AdditiveIndex`, since codes change seldom and codebooks at every step.
"""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["AdditiveIndex", "dequantize_additive", "dequantize_additive_reference"]


def dequantize_additive_reference(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """The formula itself, in operations that autograd knows. The oracle of `dequantize_additive`.

    Args:
        codes: integers below C (O, G, K).
        codebooks: (K, C, D).
        scales: (O, 1).

    Returns:
        The weight (O, G * D).
    """
    entries = torch.stack([codebooks[k][codes[..., k].long()] for k in range(codebooks.shape[0])])
    return entries.sum(dim=0).flatten(1) * scales


class AdditiveIndex:
    """Codes prepared for repeated use: where each group reads, and, built when first asked for, who reads each entry.

    Args:
        codes: integers below C (O, G, K).
        entries: C, the entries of one codebook.
    """

    def __init__(self, codes: Tensor, entries: int) -> None:
        self.rows, self.groups, self.codebooks = codes.shape
        self.entries = entries
        first = torch.arange(self.codebooks, dtype=torch.int32, device=codes.device) * entries
        self._bags = (codes.to(torch.int32) + first).view(-1, self.codebooks)

    @cached_property
    def _readers(self) -> tuple[Tensor, Tensor]:
        """For each of the K * C entries in turn the groups that read it (K * O * G,), and where its list starts."""
        total = self.codebooks * self.entries
        keys = self._bags.T.reshape(-1)
        counts = torch.bincount(keys, minlength=total)
        sortable = keys.to(torch.int16) if total <= torch.iinfo(torch.int16).max else keys  # sorts twice as fast
        groups = sortable.argsort(stable=True).to(torch.int32) % self._bags.shape[0]
        return groups, (counts.cumsum(0) - counts).to(torch.int32)

    def gather(self, codebooks: Tensor) -> Tensor:
        """Sum of the entries of every group: codebooks (K, C, D) -> (O, G * D). Not differentiable."""
        with torch.no_grad():
            table = codebooks.reshape(self.codebooks * self.entries, -1)
            return F.embedding_bag(self._bags, table, mode="sum").view(self.rows, -1)

    def scatter(self, weight: Tensor) -> Tensor:
        """The adjoint of `gather`, sum of the groups of every entry: (O, G * D) -> (K, C, D). Not differentiable."""
        with torch.no_grad():
            groups, starts = self._readers
            table = weight.reshape(self.rows * self.groups, -1)
            return F.embedding_bag(groups, table, starts, mode="sum").view(self.codebooks, self.entries, -1)


def dequantize_additive(codes: Tensor | AdditiveIndex, codebooks: Tensor, scales: Tensor) -> Tensor:
    """Weight of additive codes, differentiable with respect to codebooks and scales, once.

    Args:
        codes: integers below C (O, G, K), or their index where the same codes are used again.
        codebooks: (K, C, D).
        scales: (O, 1).

    Returns:
        The weight (O, G * D) in the dtype of the codebooks.
    """
    index = codes if isinstance(codes, AdditiveIndex) else AdditiveIndex(codes, codebooks.shape[1])
    weight: Tensor = _Dequantize.apply(codebooks, scales, index)  # type: ignore[no-untyped-call]
    return weight


class _Dequantize(torch.autograd.Function):
    """Keeps only codebooks and scales for the backward pass: to gather again costs less than a second dense weight."""

    @staticmethod
    def forward(ctx: Any, codebooks: Tensor, scales: Tensor, index: AdditiveIndex) -> Tensor:
        ctx.save_for_backward(codebooks, scales)
        ctx.index = index
        return index.gather(codebooks).mul_(scales)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        codebooks, scales = ctx.saved_tensors
        of_codebooks = ctx.index.scatter(gradient * scales) if ctx.needs_input_grad[0] else None
        of_scales = None
        if ctx.needs_input_grad[1]:
            of_scales = torch.linalg.vecdot(gradient, ctx.index.gather(codebooks)).unsqueeze(1)
        return of_codebooks, of_scales, None
