"""What quantizing a large block takes, from parts of it: too long to be done in a forecast, and not in proportion.

Factors of a second moment and singular values cost the cube of a width, once a group or matrix; the search of codes,
propagation targets and everything else is in proportion to weights. Parts of all matrices, a share s of their rows and
of their columns, are done by the real code at two shares, and A s^3 + B s^2 goes through both times.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from casp_pl.allocation import ModulePlan
from casp_pl.linalg import whitened_spectrum
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.compress import BlockQuantization, Moments
from casp_pl.quantizers import AQLMQuantizer, Quantizer

__all__ = ["SHARES", "extrapolated", "part_seconds", "spectrum_seconds"]

SHARES = (1 / 8, 1 / 4)
_GRAIN = 8  # of widths, so that Hadamard transforms have the factors that they have in the whole


def extrapolated(seconds: Callable[[float], float]) -> float:
    """A + B, of A s^3 + B s^2 through what `seconds` gives for both `SHARES`; neither is negative."""
    small, large = SHARES
    at_small, at_large = seconds(small) / small**2, seconds(large) / large**2
    cubic = min(max(0.0, (at_large - at_small) / (large - small)), at_large / large)
    return cubic + at_large - cubic * large


@torch.no_grad()
def part_seconds(
    probe: ModelAdapter,
    plans: Sequence[ModulePlan],
    quantization: BlockQuantization,
    quantizer: Quantizer,
    references: Sequence[Mapping[str, Tensor]],
    share: float,
) -> float:
    """Seconds for parts of all linears of a block: targets, low-rank factors and codes, without moments.

    Args:
        probe: its block 0 is taken.
        plans: of the block's linears.
        quantization: settings.
        quantizer: does the rounding.
        references: per batch what the first linear of every group reads, (N, I).
        share: of rows and columns.
    """
    by_name = {name: plan for plan in plans for name in probe.linear_names if plan.name.endswith("." + name)}
    total = 0.0
    for group in probe.linear_groups:
        moment = _moment(references, group[0], share)
        start = time.perf_counter()
        aim = quantization.aim(Moments(moment, moment if quantization.follows_original else None))
        for name in group:
            linear, plan = _part(probe, name, share), by_name[name]
            rank = None if plan.rank is None else _width(plan.rank, share)
            part = replace(plan, shape=(linear.out_features, linear.in_features), rank=rank)
            target = linear.weight if aim is None else aim.of(linear.weight)
            quantization.compress_linear(linear, target, part, _for_part(quantizer, plan, share), moment)
        total += time.perf_counter() - start
    return total


@torch.no_grad()
def spectrum_seconds(probe: ModelAdapter, references: Sequence[Mapping[str, Tensor]], share: float) -> float:
    """Seconds for the singular values that calibration computes of a block, of parts of these linears."""
    moment = _moment(references, probe.group_heads[0], share)
    start = time.perf_counter()
    for name in probe.low_rank_names:
        whitened_spectrum(_part(probe, name, share).weight, moment)
    return time.perf_counter() - start


def _width(size: int, share: float) -> int:
    return size if share == 1 else min(size, max(_GRAIN, _GRAIN * round(size * share / _GRAIN)))


def _part(probe: ModelAdapter, name: str, share: float) -> nn.Linear:
    linear: Any = probe.blocks[0].get_submodule(name)
    rows, columns = (_width(size, share) for size in linear.weight.shape)
    part = nn.Linear(columns, rows, bias=False, device=linear.weight.device)
    part.weight.copy_(linear.weight[:rows, :columns])
    return part


def _moment(references: Sequence[Mapping[str, Tensor]], name: str, share: float) -> Tensor:
    inputs = torch.cat([seen[name] for seen in references]).float()
    inputs = inputs[:, : _width(inputs.shape[1], share)]
    return inputs.T @ inputs / len(inputs)


def _for_part(quantizer: Quantizer, plan: ModulePlan, share: float) -> Quantizer:
    if not isinstance(quantizer, AQLMQuantizer):
        return quantizer
    rows, columns = plan.shape
    return quantizer.for_part(share, min(rows, plan.rank or rows), columns, plan.bits)
