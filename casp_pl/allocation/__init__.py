"""Which rank and how many bits every linear gets."""

from casp_pl.allocation.accounting import BitCosts, ModuleBits, module_bits
from casp_pl.allocation.bits import BitItem, allocate_bits, allocate_bits_greedily, continuous_bits
from casp_pl.allocation.build import build_plan
from casp_pl.allocation.choices import BitChoices, Granularity, ModuleShape, bit_choices, choices_of_plan
from casp_pl.allocation.curve import CurvePoint, LevelChange, error_curve, predicted_error, reallocated, steps_from
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
    "BitChoices",
    "BitCosts",
    "BitItem",
    "CompressionPlan",
    "Counts",
    "CurvePoint",
    "Granularity",
    "LevelChange",
    "ModuleBits",
    "ModulePlan",
    "ModuleShape",
    "allocate_bits",
    "allocate_bits_greedily",
    "bit_choices",
    "block_influence_scores",
    "build_plan",
    "choices_of_plan",
    "continuous_bits",
    "error_curve",
    "explicit_ranks",
    "explicit_scores",
    "first_last_scores",
    "module_bits",
    "predicted_error",
    "proxy_loss_scores",
    "reallocated",
    "sensitivity_scores",
    "spectral_ranks",
    "steps_from",
    "uniform_rank",
]
