"""AQLM as its paper has it (arXiv 2401.06118, section 3), the baseline that `AQLMQuantizer` is measured against.

Codebooks start from residual k-means on the scaled weight. Rounds follow, of 100 full-batch steps of Adam on codebooks
and scales in float64 and of one search of all codes, group after group and codebook after codebook, with beams of one,
until the loss improves by less than 1 %.

Letters: O out, I in, G groups a row, K codebooks, C entries a codebook, D group length.
"""

import torch
from torch import Tensor

__all__ = ["official_aqlm"]

_BOOKS, _ENTRIES, _LENGTH = 2, 256, 8
_STEPS, _LR = 100, 1e-4
_TOLERANCE = 0.01


def official_aqlm(weight: Tensor, second_moment: Tensor, *, rounds: int = 100, seed: int = 0) -> Tensor:
    """The weight (O, I) that 2 codebooks of 256 entries of 8 weights make of it; at most `rounds` rounds."""
    generator = torch.Generator().manual_seed(seed)
    scales = weight.square().mean(dim=1, keepdim=True).sqrt()
    codebooks, codes = _residual_kmeans((weight / scales).view(-1, _LENGTH), generator)
    codes = codes.view(_BOOKS, len(weight), -1)
    before = float("inf")
    for _ in range(rounds):
        codebooks, scales, loss = _adam(weight, second_moment, codes, codebooks, scales)
        if loss > (1 - _TOLERANCE) * before:
            break
        before = loss
        codes = _search(weight, second_moment, codes, codebooks, scales)
    return _decode(codes, codebooks, scales)


def _decode(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    entries = torch.stack([book[own] for book, own in zip(codebooks, codes, strict=True)])  # (K, O, G, D)
    return entries.sum(dim=0).flatten(1) * scales


def _residual_kmeans(vectors: Tensor, generator: torch.Generator, iterations: int = 100) -> tuple[Tensor, Tensor]:
    """Codebooks (K, C, D) and codes (K, vectors): every codebook clusters what those before it leave."""
    codebooks, codes, rest = [], [], vectors
    for _ in range(_BOOKS):
        centres = rest[torch.randperm(len(rest), generator=generator)[:_ENTRIES]].clone()
        for _ in range(iterations):
            own = _nearest(rest, centres)
            sums = torch.zeros_like(centres).index_add_(0, own, rest)
            counts = torch.bincount(own, minlength=_ENTRIES).unsqueeze(1)
            moved = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
            if torch.allclose(moved, centres, atol=1e-5):
                break
            centres = moved
        own = _nearest(rest, centres)
        codebooks.append(centres)
        codes.append(own)
        rest = rest - centres[own]
    return torch.stack(codebooks), torch.stack(codes)


def _nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    return torch.addmm(centres.square().sum(dim=1), vectors, centres.T, alpha=-2).argmin(dim=1)


def _adam(
    weight: Tensor, moment: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, float]:
    """100 steps on codebooks and scales; returns both and the proxy loss."""
    target, wide = weight.double(), moment.double()
    tables = [codebooks.double().requires_grad_(), scales.double().requires_grad_()]
    optimizer = torch.optim.Adam(tables, lr=_LR, betas=(0.9, 0.95))

    def loss() -> Tensor:
        error = target - _decode(codes, *tables)
        return ((error @ wide) * error).sum() / len(weight)

    for _ in range(_STEPS):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with torch.no_grad():
        return tables[0].detach().float(), tables[1].detach().float(), float(loss())


def _search(weight: Tensor, moment: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """One sweep over all groups; every code in turn becomes the best one given all others."""
    codes = codes.clone()
    product = (weight - _decode(codes, codebooks, scales)) @ moment  # (O, I), kept up to date
    for g in range(codes.shape[2]):
        columns = slice(g * _LENGTH, (g + 1) * _LENGTH)
        own = moment[columns, columns]
        for k, book in enumerate(codebooks):
            norms = ((book @ own) * book).sum(dim=1)
            old = book[codes[k, :, g]]
            linear = product[:, columns] / scales + old @ own
            best = torch.addmm(norms, linear, book.T, alpha=-2).argmin(dim=1)
            product -= (scales * (book[best] - old)) @ moment[columns]
            codes[k, :, g] = best
    return codes
