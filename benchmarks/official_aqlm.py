"""AQLM as its authors released it (arXiv 2401.06118), the baseline that `AQLMQuantizer` is measured against.

What is followed is github.com/Vahe1994/AQLM at e79a896: `AQEngine.quantize` of aq_engine.py with `QuantizedWeight` of
src/aq.py, src/kmeans.py and src/beam_search_xtx.py, with main.py's defaults and the README's tolerance of 1 %:

1. Row scales are L2 norms of rows; codebooks start from residual k-means of at most 100 iterations on all of W / s.
2. A round is 100 full-batch steps on codebooks and scales, by one Adam for all rounds, with betas (0, 0.95), amsgrad
   and lr 1e-4; tables in float32, the loss tr(E H E^T) / O in float64. Then all codes are searched once, input groups
   and in each of them codebooks in random order, with a beam of one.
3. The rounds end when a round has lowered the loss, as it is before its first step, by less than 1 % of the least one.

The search does the released work too: for every group and codebook it multiplies the whole error with the group's
columns of H and decodes the whole weight anew.

Letters: O out, I in, G groups a row, K codebooks, C entries a codebook, D group length.
"""

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Official", "official_aqlm"]

_BOOKS, _ENTRIES, _LENGTH = 2, 256, 8
_KMEANS_ITERATIONS, _KMEANS_CHECK = 100, 10
_STEPS, _LR, _BETAS = 100, 1e-4, (0.0, 0.95)
_TOLERANCE = 0.01
_SMALLEST_SCALE = 1e-9


class Official(NamedTuple):
    """What the procedure makes of a weight.

    Attributes:
        weight: (O, I), of 2 codebooks of 256 entries of 8 weights.
        rounds: of steps and a search that were run.
        ended: whether it ended by itself, not because no more rounds were allowed.
    """

    weight: Tensor
    rounds: int
    ended: bool


def official_aqlm(weight: Tensor, second_moment: Tensor, *, rounds: int = 1000, seed: int = 0) -> Official:
    """Quantizes a weight (O, I) for inputs of second moment (I, I), in at most `rounds` rounds."""
    generator, order = torch.Generator().manual_seed(seed), random.Random(seed)
    weight, wide = weight.float(), second_moment.double()
    scales = weight.norm(dim=1, keepdim=True) + _SMALLEST_SCALE
    codebooks, codes = _residual_kmeans((weight / scales).view(-1, _LENGTH), generator)
    codes = codes.view(len(weight), -1, _BOOKS)
    tables = [codebooks.requires_grad_(), scales.requires_grad_()]
    optimizer = torch.optim.Adam(tables, lr=_LR, betas=_BETAS, amsgrad=True)
    least = float("inf")
    for done in range(rounds):
        for step in range(_STEPS):
            loss = _loss(weight, wide, _decode(codes, codebooks, scales))
            if step == 0:
                if loss.item() / least > 1 - _TOLERANCE:
                    return Official(_decode(codes, codebooks, scales).detach(), done, ended=True)
                least = min(least, loss.item())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        codes = _search(weight, wide.float(), codes, codebooks.detach(), scales.detach(), order)
    return Official(_decode(codes, codebooks, scales).detach(), rounds, ended=False)


def _loss(weight: Tensor, moment: Tensor, made: Tensor) -> Tensor:
    error = (made - weight).to(moment.dtype)
    return (error @ moment).flatten() @ error.flatten() / len(weight)


def _decode(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """Codes (O, G, K), codebooks (K, C, D) and scales (O, 1) -> weight (O, I), differentiable."""
    places = codes + _ENTRIES * torch.arange(_BOOKS)
    sums = F.embedding_bag(places.flatten(0, 1), codebooks.flatten(0, 1), mode="sum")
    return sums.view(len(codes), -1) * scales


def _residual_kmeans(vectors: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codebooks (K, C, D) and codes (vectors, K): every codebook clusters what those before it leave."""
    codebooks, codes, rest = [], [], vectors
    for _ in range(_BOOKS):
        centres = _kmeans(rest, generator)
        own = _nearest(rest, centres)
        codebooks.append(centres)
        codes.append(own)
        rest = rest - centres[own]
    return torch.stack(codebooks), torch.stack(codes, dim=1)


def _kmeans(vectors: Tensor, generator: torch.Generator) -> Tensor:
    """Centres (C, D), at first random vectors; whether they still move is looked at in every tenth iteration."""
    centres = vectors[torch.randperm(len(vectors), generator=generator)[:_ENTRIES]]
    for iteration in range(_KMEANS_ITERATIONS):
        own = _nearest(vectors, centres)
        sums = torch.zeros_like(centres).index_add_(0, own, vectors)
        counts = torch.bincount(own, minlength=_ENTRIES).unsqueeze(1)
        moved = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
        if iteration % _KMEANS_CHECK == 0 and torch.allclose(moved, centres, rtol=1e-6, atol=1e-8):
            break
        centres = moved
    return centres


def _nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    return torch.addmm(centres.square().sum(dim=1), vectors, centres.T, beta=-0.5).argmax(dim=1)


def _search(
    weight: Tensor, moment: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, order: random.Random
) -> Tensor:
    """One sweep over all groups; every code in turn becomes the best one given all others."""
    codes, made = codes.clone(), _decode(codes, codebooks, scales)
    losses = _row_losses(weight, moment, made)  # (O,), carried along from the change that each code makes
    for g in _shuffled(codes.shape[1], order):
        columns = slice(g * _LENGTH, (g + 1) * _LENGTH)
        own = moment[columns, columns]
        for k in _shuffled(_BOOKS, order):
            book, old = codebooks[k], codebooks[k][codes[:, g, k]]
            rest = weight - made
            rest[:, columns] += old * scales
            linear = rest @ moment[:, columns]  # (O, D)
            gain = (book @ linear.T - (old * linear).sum(dim=1)) * scales.T  # (C, O)
            new_norms = ((book @ own) * book).sum(dim=1, keepdim=True) * scales.T.square()
            old_norms = ((old * scales @ own) * (old * scales)).sum(dim=1)
            best = torch.topk(losses - 2 * gain + new_norms - old_norms, 1, dim=0, largest=False)
            losses, codes[:, g, k] = best.values[0], best.indices[0]
            made = _decode(codes, codebooks, scales)
    return codes


def _row_losses(weight: Tensor, moment: Tensor, made: Tensor) -> Tensor:
    error = made - weight
    return ((error @ moment) * error).sum(dim=1)


def _shuffled(count: int, order: random.Random) -> list[int]:
    numbers = list(range(count))
    order.shuffle(numbers)
    return numbers
