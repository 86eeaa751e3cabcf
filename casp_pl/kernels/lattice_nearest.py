"""The nearest points of E8P by symmetry: 256 patterns for each shift instead of 65,536 points.

For one shift s and z = x - s the best signs of a pattern a are those of z, if their number of minus signs has the
parity that the pattern asks for; else the one sign is turned where that costs least. So

    |z - point|^2 = |z|^2 + |a|^2 - 2 <a, |z|> + 4 [parity differs] min_i a_i |z_i|.

On a CPU compiled loops take one vector after the other (`numba_lattice`); torch does the same for many at once.

Letters: N vectors, P = 256 patterns, R runs (pattern p belongs to run p mod R), K = 2 R candidates.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.profiler import record_function

from casp_pl.kernels.compiled import lattice_loops
from casp_pl.kernels.lattice import GROUP_LENGTH, QUARTER, decode_points, e8p_even_patterns, e8p_patterns, e8p_points
from casp_pl.kernels.nearest import argmin_of_columns

__all__ = ["e8p_candidates", "e8p_nearest", "encode_e8p", "encode_e8p_reference"]

_CHUNK = 512  # vectors at a time on a CPU: 512 KiB of scores in float32 stay in a core's cache
_CUDA_CHUNK = 1 << 16  # on a GPU: 64 MiB


def encode_e8p_reference(x: Tensor) -> Tensor:
    """`encode_e8p` by comparing with all 65,536 points, the oracle of its test."""
    points = e8p_points(x.device).to(x.dtype) * QUARTER
    return torch.cat([torch.cdist(part.T, points).argmin(dim=1) for part in torch.split(x, _CHUNK, dim=1)])


def encode_e8p(x: Tensor) -> Tensor:
    """Codes of the nearest points: x (8, N) -> (N,) int64."""
    codes = e8p_candidates(x, 1)
    first, second = (_distances(x, own) for own in codes)
    return torch.where(first <= second, codes[0], codes[1])


def e8p_candidates(x: Tensor, runs: int) -> Tensor:
    """Near points for a search in another metric: the nearest of each run of patterns for each shift.

    Args:
        x: (8, N), float32.
        runs: R, a divisor of 256. The nearest point of all is always among the candidates.

    Returns:
        Codes (K, N), int64.
    """
    if (loops := lattice_loops(x)) is not None:
        codes = torch.empty(2 * runs, x.shape[1], dtype=torch.int64, device=x.device)
        with record_function("casp_pl::e8p_candidates"):
            loops.candidates(x, *_by_run(runs), runs, codes)
        return codes
    chunk = _CUDA_CHUNK if x.is_cuda else _CHUNK
    return torch.cat([_candidates(part, runs) for part in torch.split(x, chunk, dim=1)], dim=1)


def e8p_nearest(x: Tensor, metric: Tensor, runs: int) -> tuple[Tensor, Tensor] | None:
    """The best of `e8p_candidates` in a metric, by a compiled loop; None where there is none for x.

    Args:
        x: (8, N), float32.
        metric: M (8, 8), symmetric and positive definite.
        runs: R.

    Returns:
        Codes (N,) int64, and what is left of x (8, N).
    """
    if (loops := lattice_loops(x)) is None:
        return None
    codes, rest = torch.empty(x.shape[1], dtype=torch.int64, device=x.device), torch.empty_like(x)
    with record_function("casp_pl::e8p_nearest"):
        loops.nearest(x, metric, *_by_run(runs), runs, codes, rest)
    return codes, rest


@lru_cache(maxsize=8)
def _by_run(runs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Patterns (8, P) with the runs one after the other, |a|^2, 1 where minus signs are odd, numbers in a code (P,)."""
    with torch.inference_mode(False):
        patterns = e8p_patterns(torch.device("cpu"))
        numbers = torch.arange(len(patterns), device="cpu").view(-1, runs).T.flatten()
        own = patterns[numbers]
        odd = (numbers >= e8p_even_patterns()).float()
        return own.T.contiguous(), own.square().sum(dim=1), odd, numbers


def _candidates(x: Tensor, runs: int) -> Tensor:
    patterns = e8p_patterns(x.device)
    found = []
    for shift_bit, shift in enumerate((QUARTER, -QUARTER)):
        shifted = x - shift
        size, minus = shifted.abs(), shifted < 0
        scores = _scores(patterns, size, minus.sum(dim=0) % 2)
        best = argmin_of_columns(scores.view(-1, runs * x.shape[1])).view(runs, -1)
        chosen = best * runs + torch.arange(runs, device=x.device)[:, None]
        found.append(_codes(patterns, chosen, size, minus) | shift_bit << 15)
    return torch.cat(found)


def _scores(patterns: Tensor, size: Tensor, odd: Tensor) -> Tensor:
    """|a|^2 - 2 <a, |z|> + 4 [parity differs] min_i a_i |z_i| of all patterns a (P, 8): (P, N).

    Args:
        patterns: (P, 8).
        size: |z| (8, N).
        odd: 1 where z has an odd number of minus signs, else 0 (N,).
    """
    flip = patterns[:, :1] * size[:1]
    product = torch.empty_like(flip)
    for i in range(1, GROUP_LENGTH):
        torch.mul(patterns[:, i : i + 1], size[i : i + 1], out=product)
        torch.minimum(flip, product, out=flip)
    flip[: e8p_even_patterns()] *= odd
    flip[e8p_even_patterns() :] *= 1 - odd
    plain = torch.addmm(patterns.square().sum(dim=1, keepdim=True), patterns, size, alpha=-2)
    return plain.add_(flip, alpha=4)


def _codes(patterns: Tensor, chosen: Tensor, size: Tensor, minus: Tensor) -> Tensor:
    """Codes (R, N) with shift bit 0 of the best signs of the chosen patterns (R, N)."""
    place = torch.arange(GROUP_LENGTH, device=size.device)
    signs = (minus.to(torch.int64) << place[:, None]).sum(dim=0)
    differs = (minus.sum(dim=0) % 2) != (chosen >= e8p_even_patterns())
    cheapest = (patterns[chosen] * size.T).argmin(dim=2)
    flipped = differs.to(torch.int64) << cheapest
    return chosen | ((signs ^ flipped) & 127) << 8  # the eighth sign follows from the others


def _distances(x: Tensor, codes: Tensor) -> Tensor:
    points = decode_points(codes, e8p_points(x.device)).T.to(x.dtype) * QUARTER
    return (x - points).square().sum(dim=0)
