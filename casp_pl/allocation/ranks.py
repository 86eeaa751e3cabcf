"""Rank allocation: how much of W_q and W_k the low-rank products keep.

Legend: O out_features, I in_features, R rank; a product of rank R holds R (O + I) parameters instead of O I.
Source: CASP, arXiv 2503.05936 (uniform); `spectral` is our own.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from casp_pl.allocation.bits import BitItem, allocate_bits
from casp_pl.errors import ConfigError, NumericsError

__all__ = ["explicit_ranks", "spectral_ranks", "uniform_rank"]

_DENSE = 0  # level that stands for "no product at all" in the allocation


def uniform_rank(shape: tuple[int, int], keep_ratio: float, grain: int = 1) -> int:
    """`floor(keep_ratio O I / (O + I))`, rounded down to a multiple of `grain`.

    Args:
        shape: (O, I) of the weight.
        keep_ratio: share of the parameters that the two factors keep, in (0, 1].
        grain: multiple that the quantizer wants ranks to be.

    Raises:
        ConfigError: `keep_ratio` outside (0, 1], or so small that the rank would be 0.
    """
    _check_keep_ratio(keep_ratio)
    out_features, in_features = shape
    exact = keep_ratio * out_features * in_features / (out_features + in_features)
    rank = math.floor(exact + 1e-9) // grain * grain
    if rank == 0:
        needed = math.ceil(1e4 * grain * (out_features + in_features) / (out_features * in_features)) / 1e4
        remedy = f"Give at least {needed}." if needed <= 1 else "No ratio is enough for this weight: leave it dense."
        raise ConfigError(
            f"keep_ratio: {keep_ratio} gives a {out_features}x{in_features} weight rank 0, "
            f"ranks being multiples of {grain}.\n{remedy}"
        )
    return rank


def spectral_ranks(
    spectra: Sequence[Tensor],
    shapes: Sequence[tuple[int, int]],
    keep_ratio: float,
    grain: int = 1,
    *,
    relative: bool = True,
) -> list[int | None]:
    """Spend the parameters of `uniform_rank` where the whitened tail energy falls most; None leaves a weight dense.

    Exact: minimises the sum of tail energies, sum over i > R of S_i^2, over all ranks that are multiples of `grain` and
    save parameters, with "dense" (tail 0, O I parameters) as a choice.

    Args:
        spectra: singular values of every whitened weight, descending, each (min(O, I),).
        shapes: (O, I) of every weight.
        keep_ratio: share of the parameters that `uniform_rank` would keep; the total is the same or less.
        grain: multiple that ranks are rounded to.
        relative: measure each tail as a share of its weight's own energy, so that weights with loud inputs do not
            take everything.

    Raises:
        ConfigError: `keep_ratio` is unusable.
        NumericsError: a spectrum is not finite.
    """
    budget = sum(uniform_rank(shape, keep_ratio, grain) * sum(shape) for shape in shapes)
    items = [_rank_choices(spectrum, shape, grain, relative) for spectrum, shape in zip(spectra, shapes, strict=True)]
    return [rank if rank != _DENSE else None for rank in allocate_bits(items, budget)]


def explicit_ranks(
    ranks: Mapping[str, int | None], shapes: Mapping[str, tuple[int, int]], grain: int = 1
) -> dict[str, int | None]:
    """Ranks that the user wrote down, rounded down to the grain; None leaves a weight dense.

    Args:
        ranks: full module name to rank.
        shapes: (O, I) of every module that can become low-rank; what `ranks` leaves out stays dense.
        grain: multiple that ranks are rounded to.

    Raises:
        ConfigError: an unknown module, or a rank that is 0 after rounding or exceeds min(O, I).
    """
    unknown = sorted(set(ranks) - set(shapes))
    if unknown:
        raise ConfigError(f"ranks: no module is called '{unknown[0]}'; known are {', '.join(list(shapes)[:4])} ...")
    return {name: _rounded(name, ranks.get(name), shape, grain) for name, shape in shapes.items()}


def _rank_choices(spectrum: Tensor, shape: tuple[int, int], grain: int, relative: bool) -> BitItem:
    energy = spectrum.detach().double().cpu().square()
    total = float(energy.sum())
    if not math.isfinite(total):
        raise NumericsError(f"The spectrum of a {shape[0]}x{shape[1]} weight is not finite; look at its second moment.")
    tails = (energy.flip(0).cumsum(0).flip(0) / (total if relative and total > 0 else 1.0)).tolist()
    out_features, in_features = shape
    choices = {_DENSE: (out_features * in_features, 0.0)}
    for rank in range(grain, min(shape) + 1, grain):
        parameters = rank * (out_features + in_features)
        if parameters < out_features * in_features:
            choices[rank] = (parameters, tails[rank] if rank < len(tails) else 0.0)
    return BitItem(score=1.0, choices=choices)


def _rounded(name: str, rank: int | None, shape: tuple[int, int], grain: int) -> int | None:
    if rank is None:
        return None
    if rank > min(shape):
        raise ConfigError(f"ranks: {rank} for {name} exceeds min(O, I) of its {shape[0]}x{shape[1]} weight.")
    if rank < grain:
        raise ConfigError(f"ranks: {rank} for {name} is below the grain of {grain}; give at least that, or null.")
    return rank // grain * grain


def _check_keep_ratio(keep_ratio: float) -> None:
    if not 0 < keep_ratio <= 1:
        raise ConfigError(f"keep_ratio: {keep_ratio} is outside (0, 1]; it is the share of parameters to keep.")
