"""Chooses the bits of every linear from the scores that the calibration pass measured (CASP, section 3; method C)."""

from typing import Literal

import lightning.pytorch as pl

from casp_pl.allocation import (
    CompressionPlan,
    ModuleShape,
    block_influence_scores,
    build_plan,
    explicit_scores,
    first_last_scores,
    proxy_loss_scores,
    sensitivity_scores,
)
from casp_pl.callbacks.low_rank_allocation import LowRankAllocation
from casp_pl.errors import ConfigError
from casp_pl.models.adapter import ModelAdapter
from casp_pl.modules.calibration import CalibrationModule
from casp_pl.modules.statistics import CalibrationStatistics
from casp_pl.quantizers import Quantizer

__all__ = ["BitAllocation"]


class BitAllocation(pl.Callback):
    """At the end of the calibration pass: ranks and scores -> `plan`, the best allocation within the budget (exact).

    Args:
        budget: bits per original weight of the compressed linears.
        counts: what the budget counts: `codes` alone (the paper's convention) or the `total` with every table.
        score: how much a block's distortion counts: `block_influence` (1 - cosine of its input and output),
            `sensitivity` (the KL that an error in each linear causes, from gradients of the original), `proxy_loss` (a
            quick rounding of the block), `first_last` (the first blocks and the last), `uniform` (all alike),
            `explicit`.
        granularity: whether the linears of a block share their bits.
        factor_bits: bits of the low-rank factors.
        scores: one number per block, for `explicit`.
        overrides: bits that you choose yourself, of every linear with a part of a name in it, words between dots
            (`mlp.down_proj: 4`, `layers.0: 3`; the last that fits counts). The others get what is left of the budget.
    """

    def __init__(
        self,
        *,
        budget: float = 2.0,
        counts: Literal["codes", "total"] = "codes",
        score: Literal[
            "block_influence", "sensitivity", "proxy_loss", "first_last", "uniform", "explicit"
        ] = "block_influence",
        granularity: Literal["block", "linear"] = "block",
        factor_bits: int = 3,
        scores: list[float] | None = None,
        overrides: dict[str, int] | None = None,
    ) -> None:
        if budget <= 0:
            raise ConfigError(f"bits.budget: {budget} is not a positive number of bits per weight.")
        self.budget = budget
        self.counts = counts
        self.score = score
        self.granularity = granularity
        self.factor_bits = factor_bits
        self.explicit = scores or []
        self.overrides = overrides or {}
        self.quantizer: Quantizer | None = None
        self.low_rank: LowRankAllocation | None = None
        self.plan: CompressionPlan | None = None

    def attach(self, quantizer: Quantizer, low_rank: LowRankAllocation) -> None:
        """What states the costs, and what chose the ranks before."""
        self.quantizer, self.low_rank = quantizer, low_rank
        low_rank.grain = max(low_rank.grain, quantizer.rank_grain)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose, once the statistics and the ranks are there."""
        if isinstance(pl_module, CalibrationModule) and pl_module.statistics is not None and self.low_rank is not None:
            self.plan = self.make_plan(pl_module.adapter, self.low_rank.ranks, pl_module.statistics)

    def make_plan(
        self, adapter: ModelAdapter, ranks: dict[str, int | None], statistics: CalibrationStatistics | None
    ) -> CompressionPlan:
        """The plan; without statistics (a dry run) measured scores are replaced by `first_last`.

        Raises:
            ConfigError: the budget is impossible (the message names the feasible interval), or a setting of the
                quantizer is of no linear.
        """
        if self.quantizer is None:
            raise ValueError("attach() comes first")
        modules = [
            ModuleShape(adapter.full_name(number, name), number, shape)
            for number in range(len(adapter.blocks))
            for name, shape in adapter.shapes(number).items()
        ]
        self.quantizer.check_names([module.name for module in modules])
        return build_plan(
            model=type(adapter.model).__name__,
            modules=modules,
            ranks=ranks,
            scores=self._scores(modules, len(adapter.blocks), statistics),
            quantizer=self.quantizer,
            factor_bits=self.factor_bits,
            budget=self.budget,
            counts=self.counts,
            granularity=self.granularity,
            overrides=self.overrides,
        )

    def _scores(
        self, modules: list[ModuleShape], blocks: int, statistics: CalibrationStatistics | None
    ) -> list[float] | dict[str, float]:
        if self.score == "explicit":
            return explicit_scores(self.explicit, blocks)
        if self.score == "uniform":
            return [1.0] * blocks
        if self.score == "first_last" or statistics is None:
            return first_last_scores(blocks)
        if self.score == "block_influence":
            return block_influence_scores(statistics.block_influence.tolist())
        if self.score == "sensitivity":
            return sensitivity_scores(statistics.sensitivity)
        losses = proxy_loss_scores([statistics.rounding[module.name] for module in modules])
        return {module.name: loss for module, loss in zip(modules, losses, strict=True)}
