"""Chooses the ranks of W_q and W_k from the spectra that the calibration pass measured (CASP, section 3; method B)."""

from collections.abc import Mapping
from typing import Literal

import lightning.pytorch as pl

from casp_pl.allocation import explicit_ranks, spectral_ranks, uniform_rank
from casp_pl.errors import ConfigError
from casp_pl.models.adapter import ModelAdapter
from casp_pl.modules.calibration import CalibrationModule
from casp_pl.modules.statistics import CalibrationStatistics

__all__ = ["LowRankAllocation"]


class LowRankAllocation(pl.Callback):
    """At the end of the calibration pass: module name -> rank (None: stays one matrix), in `ranks`.

    Args:
        mode: `uniform` keeps the same share of parameters everywhere (the paper), `spectral` spends the same total
            where the whitened tail energy falls most, `explicit` takes `ranks`, `off` leaves every matrix whole.
        keep_ratio: share of the parameters of W_q and W_k that the two factors keep.
        ranks: full module name -> rank, for `explicit`.
        grain: ranks are rounded down to a multiple of it; the pipeline raises it to the quantizer's grain.
    """

    def __init__(
        self,
        *,
        mode: Literal["uniform", "spectral", "explicit", "off"] = "uniform",
        keep_ratio: float = 0.25,
        ranks: dict[str, int] | None = None,
        grain: int = 1,
    ) -> None:
        if not 0 < keep_ratio <= 1:
            raise ConfigError(f"low_rank.keep_ratio: {keep_ratio} is outside (0, 1].")
        self.mode = mode
        self.keep_ratio = keep_ratio
        self.grain = grain
        self.explicit = ranks or {}
        self.ranks: dict[str, int | None] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose, once the statistics are there."""
        if isinstance(pl_module, CalibrationModule) and pl_module.statistics is not None:
            self.ranks = self.choose(pl_module.adapter, pl_module.statistics)

    def choose(self, adapter: ModelAdapter, statistics: CalibrationStatistics | None) -> dict[str, int | None]:
        """The ranks by full module name; `spectral` needs statistics, the other modes do not."""
        shapes = {
            adapter.full_name(number, name): adapter.shapes(number)[name]
            for number in range(len(adapter.blocks))
            for name in adapter.low_rank_names
        }
        if self.mode == "off":
            return {}
        if self.mode == "explicit":
            return explicit_ranks(self.explicit, shapes, self.grain)
        if self.mode == "spectral" and statistics is not None:
            return self._spectral(shapes, statistics)
        return {name: uniform_rank(shape, self.keep_ratio, self.grain) for name, shape in shapes.items()}

    def _spectral(
        self, shapes: Mapping[str, tuple[int, int]], statistics: CalibrationStatistics
    ) -> dict[str, int | None]:
        spectra = [statistics.spectra[name] for name in shapes]
        ranks = spectral_ranks(spectra, list(shapes.values()), self.keep_ratio, self.grain)
        return dict(zip(shapes, ranks, strict=True))
