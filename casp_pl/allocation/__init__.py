"""Which rank and how many bits every linear gets."""

from casp_pl.allocation.accounting import BitCosts, ModuleBits, module_bits
from casp_pl.allocation.bits import BitItem, allocate_bits, allocate_bits_greedily, continuous_bits
from casp_pl.allocation.build import Granularity, ModuleShape, build_plan
from casp_pl.allocation.plan import CompressionPlan, Counts, ModulePlan
from casp_pl.allocation.ranks import explicit_ranks, spectral_ranks, uniform_rank
from casp_pl.allocation.scores import (
    block_influence_scores,
    explicit_scores,
    first_last_scores,
    proxy_loss_scores,
    sensitivity_scores,
)

__all__ = [
    "BitCosts",
    "BitItem",
    "CompressionPlan",
    "Counts",
    "Granularity",
    "ModuleBits",
    "ModulePlan",
    "ModuleShape",
    "allocate_bits",
    "allocate_bits_greedily",
    "block_influence_scores",
    "build_plan",
    "continuous_bits",
    "explicit_ranks",
    "explicit_scores",
    "first_last_scores",
    "module_bits",
    "proxy_loss_scores",
    "sensitivity_scores",
    "spectral_ranks",
    "uniform_rank",
]
