"""Additive (AQLM) weights: every group of D weights is the sum of K codebook entries, times the scale of its row.

    W[o, gD : (g+1)D] = scales[o] * sum_k codebooks[k, codes[o, g, k]]        (AQLM, arXiv 2401.06118, section 3.1)

Letters: O out, G groups a row, K codebooks, C entries a codebook, D group length.

On a CPU compiled loops do both directions (`numba_additive`), on a GPU a kernel in Triton does the first. Elsewhere
they are sums over bags of rows, which `embedding_bag` does in one pass and in a fixed order: forward over the K entries
of a group, backward over the groups that share an entry, found by one stable sort of the codes. The sort outlives the
call in an `AdditiveIndex`, since codes change seldom and codebooks at every step.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from casp_pl.kernels.compiled import AdditiveLoops, additive_loops, gather_loop
from casp_pl.processes import sum_in_order

__all__ = ["AdditiveIndex", "dequantize_additive", "dequantize_additive_reference"]

_BYTE_VALUES = 256
_PARTS = 16


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
    """Codes prepared for repeated use, in both directions. Nothing here is differentiable.

    Args:
        codes: integers below C (O, G, K).
        entries: C, the entries of one codebook.
        bounds: rows where the P parts of `scatter_parts` begin, and where the last one ends; None for a division that
            does not matter.
    """

    def __init__(self, codes: Tensor, entries: int, bounds: Sequence[int] | None = None) -> None:
        self.rows, self.groups, self.codebooks = codes.shape
        self.bounds = bounds
        self.entries = entries
        self._codes = codes.to(torch.uint8) if entries <= _BYTE_VALUES else codes

    @torch.no_grad()
    def gather(self, codebooks: Tensor, scales: Tensor) -> Tensor:
        """The weight: codebooks (K, C, D), scales (O, 1) -> (O, G * D)."""
        if self.entries > _BYTE_VALUES or (gather := gather_loop(codebooks)) is None:
            table = codebooks.reshape(self.codebooks * self.entries, -1)
            return F.embedding_bag(self._bags, table, mode="sum").view(self.rows, -1) * scales
        weight = codebooks.new_empty(self.rows, self.groups * codebooks.shape[2])
        with record_function("casp_pl::gather"):
            gather(self._codes, codebooks, scales.reshape(-1), weight)
        return weight

    @torch.no_grad()
    def scatter(self, weight: Tensor, scales: Tensor) -> Tensor:
        """The adjoint of `gather`, sums of the scaled groups that share an entry.

        Args:
            weight: (O, G * D).
            scales: (O, 1).

        Returns:
            (K, C, D).
        """
        return sum_in_order(self.scatter_parts(weight, scales))

    @torch.no_grad()
    def scatter_parts(self, weight: Tensor, scales: Tensor) -> Tensor:
        """`scatter` of every part of the rows: weight (O, G * D), scales (O, 1) -> (P, K, C, D)."""
        shape = self.codebooks, self.entries, weight.shape[1] // self.groups
        if (loops := self._loops(weight)) is not None:
            return self._scatter(loops, weight, weight.new_zeros(shape), scales)[0]
        groups, starts = self._readers
        table = (weight * scales).reshape(self.rows * self.groups, -1)
        return F.embedding_bag(groups, table, starts, mode="sum").view(-1, *shape)

    @torch.no_grad()
    def gradients(self, weight: Tensor, codebooks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradient of the weight (O, G * D) to those of codebooks (K, C, D) and scales (O, 1)."""
        if (loops := self._loops(weight)) is not None:
            parts, dots = self._scatter(loops, weight, codebooks, scales)
            return sum_in_order(parts), dots
        dots = torch.linalg.vecdot(weight, self.gather(codebooks, torch.ones_like(scales)))
        return self.scatter(weight, scales), dots.unsqueeze(1)

    def _scatter(
        self, loops: AdditiveLoops, weight: Tensor, codebooks: Tensor, scales: Tensor
    ) -> tuple[Tensor, Tensor]:
        # some parts for threads to work on; always so many, so that sums do not depend on the number of threads
        bounds = self.bounds or [part * self.rows // _PARTS for part in range(_PARTS + 1)]
        starts = torch.tensor(bounds, dtype=torch.int64, device=weight.device)
        parts, dots = codebooks.new_zeros(len(bounds) - 1, *codebooks.shape), weight.new_empty(self.rows)
        with record_function("casp_pl::scatter"):
            loops.scatter(self._codes, codebooks, scales.reshape(-1), weight, starts, parts, dots)
        return parts, dots.unsqueeze(1)

    def _loops(self, tensor: Tensor) -> AdditiveLoops | None:
        return additive_loops(tensor) if self.entries <= _BYTE_VALUES else None

    @cached_property
    def _bags(self) -> Tensor:
        """Rows of the table of all entries that every group adds (O * G, K)."""
        first = torch.arange(self.codebooks, dtype=torch.int32, device=self._codes.device) * self.entries
        return (self._codes.to(torch.int32) + first).view(-1, self.codebooks)

    @cached_property
    def _readers(self) -> tuple[Tensor, Tensor]:
        """For each of the P * K * C entries in turn the groups that read it (K * O * G,), and where its list starts."""
        bounds = torch.tensor(self.bounds or [0, self.rows], dtype=torch.int64, device=self._codes.device)
        total = (len(bounds) - 1) * self.codebooks * self.entries
        parts = torch.arange(len(bounds) - 1, dtype=torch.int32, device=bounds.device)
        first = (self.codebooks * self.entries * parts).repeat_interleave(bounds.diff()).repeat_interleave(self.groups)
        keys = (self._bags + first[:, None]).T.reshape(-1)
        counts = torch.bincount(keys, minlength=total)
        sortable = keys.to(torch.int16) if total <= torch.iinfo(torch.int16).max else keys  # sorts twice as fast
        groups = sortable.argsort(stable=True).to(torch.int32) % self._bags.shape[0]
        return groups, (counts.cumsum(0) - counts).to(torch.int32)


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
        return index.gather(codebooks, scales)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        codebooks, scales = ctx.saved_tensors
        return *ctx.index.gradients(gradient, codebooks, scales), None
