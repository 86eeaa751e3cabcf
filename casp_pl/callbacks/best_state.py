"""Fine-tuning can only help: the state with the lowest held-back loss is what remains."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

__all__ = ["BestState"]


class BestState(pl.Callback):
    """Keeps the module's state at the lowest `val_loss` (validation before training included) and restores it.

    Args:
        monitor: the logged value, lower is better.
    """

    def __init__(self, *, monitor: str = "val_loss") -> None:
        self.monitor = monitor
        self.best = float("inf")
        self.first = float("inf")
        self._state: dict[str, Tensor] = {}

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
            self._state = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the best state back."""
        if self._state:
            with torch.no_grad():
                pl_module.load_state_dict(self._state)
