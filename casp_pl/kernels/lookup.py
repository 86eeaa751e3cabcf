"""Products of a few tokens with quantized weights, without the weights.

In every format a row is a run of codes, and a code stands for a few weights, an entry of a codebook. The products of a
group of inputs with all entries are computed once, and the codes of all rows only choose which of them to add:

    y[n, o] = sum_s weights[s, o] * sum over positions m = (g, k) of span s of <x[n, g], codebooks[k, codes[o, m]]>

Letters: N tokens, O out, I in, G groups of inputs, D inputs a group, K codebooks, C entries a codebook, M = G K
positions of a row's codes, S spans of positions, each with scales of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from casp_pl.kernels.compiled import LookupLoop, lookup_loop

__all__ = ["CodeRows", "lookup_reference", "loop_for"]

_TOKENS = 16  # at a time: their tables take 12 MB where I is 4096


def lookup_reference(codes: Tensor, x: Tensor, codebooks: Tensor, weights: Tensor) -> Tensor:
    """The formula itself. The oracle of `CodeRows`.

    Args:
        codes: integers below C (O, M).
        x: (N, G * D).
        codebooks: (K, C, D).
        weights: (S, O); a span has ceil(M / S) positions.

    Returns:
        (N, O).
    """
    positions, spans = codes.shape[1], len(weights)
    books, _, length = codebooks.shape
    products = torch.einsum("ngd,kcd->ngkc", x.view(len(x), -1, length), codebooks).flatten(1, 2)
    chosen = products[:, torch.arange(positions, device=codes.device), codes.long()]  # (N, O, M)
    span = -(-positions // spans)
    summed = F.pad(chosen, (0, spans * span - positions)).view(*chosen.shape[:2], spans, span).sum(dim=3)
    return torch.einsum("nos,so->no", summed, weights)


def loop_for(x: Tensor, shape: tuple[int, int], length: int) -> LookupLoop | None:
    """The loop to look products with x up; None where the dense weight is better, or needed for gradients.

    No tokens are left to torch too, whose products know of empty tensors; a GPU launches no grid of zero programs.

    Args:
        x: (..., I).
        shape: of the weight, (O, I).
        length: D, weights that a code stands for.
    """
    if x.dtype == torch.float64 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if (fastest := lookup_loop(x.device)) is None:
        return None
    rows, in_features = shape
    loop = fastest.taking(length, rows)
    return loop if 0 < x.numel() <= loop.tokens * in_features else None


class CodeRows:
    """Codes of rows in the layout of a loop.

    Args:
        codes: uint8, below C (O, M).
        loop: one of `lookup_loops`.
    """

    def __init__(self, codes: Tensor, loop: LookupLoop) -> None:
        self._rows, self._positions = codes.shape
        self._loop = loop
        self._codes = loop.arrange(codes)

    def multiply(self, x: Tensor, codebooks: Tensor, weights: Tensor) -> Tensor:
        """Products in float32; not differentiable.

        Args:
            x: (N, at most G * D); inputs that are missing are zero.
            codebooks: (K, C, D), at most 256 entries.
            weights: (S, O); a span has ceil(M / S) positions.

        Returns:
            (N, O).
        """
        books, _, length = codebooks.shape
        groups = self._positions // books
        tokens, missing = x.shape[0], groups * length - x.shape[1]
        inputs = (F.pad(x, (0, missing)) if missing else x).float().contiguous().view(tokens, groups, length)
        sums = torch.empty(tokens, self._rows, dtype=torch.float32, device=x.device)
        span = -(-self._positions // weights.shape[0])
        tables = codebooks.float(), self._codes, weights.float().contiguous(), span
        if tokens <= _TOKENS:
            self._loop.run(inputs, *tables, sums)
            return sums
        for few in (slice(start, start + _TOKENS) for start in range(0, tokens, _TOKENS)):
            self._loop.run(inputs[few], *tables, sums[few])
        return sums
