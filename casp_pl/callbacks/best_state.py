"""Fine-tuning can only help: the state with the lowest held-back loss is what remains."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from casp_pl.modules.sharding import own_parts

__all__ = ["BestState"]


class BestState(pl.Callback):
    """Keeps the module's state at the lowest `val_loss` (validation before training included) and restores it.

    Each process keeps its own part of a model that is divided.

    Args:
        monitor: the logged value, lower is better.

    Attributes:
        best: the lowest value so far.
        first: the first one.
        state: what training may change, as it was at the lowest; empty before the first validation.
    """

    def __init__(self, *, monitor: str = "val_loss") -> None:
        self.monitor = monitor
        self.best = float("inf")
        self.first = float("inf")
        self.state: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember this state if it is the best so far."""
        value: Any = trainer.callback_metrics.get(self.monitor)
        if value is None:
            return
        loss = float(value)
        if self.first == float("inf"):
            self.first = loss
        if loss < self.best:
            self.best = loss
            self.state = {name: tensor.clone() for name, tensor in own_parts(pl_module).items()}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the best state back."""
        parts = own_parts(pl_module) if self.state else {}
        with torch.no_grad():
            for name, tensor in self.state.items():
                parts[name].copy_(tensor)
