"""The LightningModule of a stage: what it holds belongs to the run, and other stages go on with it."""

from typing import Self

import lightning.pytorch as pl

__all__ = ["StageModule"]


class StageModule(pl.LightningModule):
    """A LightningModule around a model or blocks that stay on their device when its Trainer ends.

    Lightning moves a module to the CPU then. On a GPU the next stage would find its model there, its batches here.
    """

    def cpu(self) -> Self:
        """Nothing moves."""
        return self
