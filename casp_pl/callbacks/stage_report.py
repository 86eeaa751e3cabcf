"""The report callback: when the evaluation of a stage ends, its row of the main table goes to TensorBoard."""

import time
from dataclasses import replace

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from casp_pl.callbacks.report import STAGE_NAMES, StageRow
from casp_pl.callbacks.tensorboard import log_stage
from casp_pl.modules.evaluation import EvaluationModule

__all__ = ["StageReport"]


class StageReport(pl.Callback):
    """Completes `row` with what the test run of an `EvaluationModule` measured.

    Args:
        row: name and costs of the stage, known before it is evaluated.
        started: when the stage began, as `time.monotonic` tells it; its seconds count from there.
        logger: gets the figures as stage/FIGURE at the stage's place in the run, as soon as they are there.

    Attributes:
        row: the whole row once the test run has ended.
    """

    def __init__(self, row: StageRow, *, started: float, logger: Logger | None = None) -> None:
        self.row = row
        self.started = started
        self.logger = logger

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the figures and show them."""
        if not isinstance(pl_module, EvaluationModule) or pl_module.figures is None:
            return
        figures = pl_module.figures.to_dict() | {"seconds": time.monotonic() - self.started}
        self.row = replace(self.row, **figures)
        if isinstance(self.logger, TensorBoardLogger):
            log_stage(self.logger.experiment, self.row, STAGE_NAMES.index(self.row.name))
            self.logger.experiment.flush()
