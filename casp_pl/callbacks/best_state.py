"""Fine-tuning can only help: the state with the lowest held-back loss is what remains."""

import logging
from collections.abc import Mapping
from math import inf, isfinite
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from casp_pl.errors import NumericsError
from casp_pl.modules.sharding import own_parts, trained_parts
from casp_pl.processes import is_first, mean_of_all

__all__ = ["BestState"]

_LOG = logging.getLogger(__name__)
_SMALLER_STEP = 0.25


class BestState(pl.Callback):
    """Keeps the module's state at the lowest `val_loss` (validation before training included) and restores it.

    A training loss that is NaN or infinite does not reach the optimizer: training goes on from the best state with a
    quarter of the learning rate and a fresh optimizer. That happens once; the second time is an error. The modules say
    what is trained and by which key it can be made gentler (`purpose`, `lr_key`).

    Each process keeps its own part of a model that is divided.

    Args:
        codes: whether codes change too, or parameters alone; what does not change is not kept.
        monitor: the logged value, lower is better.

    Attributes:
        best: the lowest value so far.
        first: the first one.
        state: what training may change, as it was at the lowest; empty before the first validation.
    """

    def __init__(self, *, codes: bool = True, monitor: str = "val_loss") -> None:
        self.codes = codes
        self.monitor = monitor
        self.best = inf
        self.first = inf
        self.restarts = 0
        self._validated = False
        self._loss_is_finite = True
        self.state: dict[str, Tensor] = {}

    def changing(self, module: nn.Module) -> dict[str, Tensor]:
        """This process's parts of all that training may change."""
        return own_parts(module) if self.codes else trained_parts(module)

    def notes(self) -> dict[str, float | None]:
        """What belongs to `state`, to be saved with it; None for a loss that is not finite: JSON has no such number."""
        losses = {"best": self.best, "first": self.first}
        return {name: loss if isfinite(loss) else None for name, loss in losses.items()} | {"restarts": self.restarts}

    def recall(self, state: dict[str, Tensor], notes: Mapping[str, float | None]) -> None:
        """Go on from a saved state and its `notes`; the learning rates are as after its restarts."""
        self.state, self._validated = state, True
        best, first = (inf if (loss := notes[name]) is None else loss for name in ("best", "first"))
        self.best, self.first, self.restarts = best, first, int(notes["restarts"] or 0)

    @property
    def rate(self) -> float:
        """What the learning rates are multiplied with."""
        return float(_SMALLER_STEP**self.restarts)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember this state if it is the best so far."""
        value: Any = trainer.callback_metrics.get(self.monitor)
        if value is None:
            return
        loss = float(value)
        if not self._validated:
            self.first, self._validated = loss, True
        if loss < self.best:
            self.best = loss
            self.state = {name: tensor.clone() for name, tensor in self.changing(pl_module).items()}

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Look at the loss; NaN of one process is NaN in the mean of all, so they decide alike."""
        self._loss_is_finite = bool(mean_of_all(loss.detach()).isfinite())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """After a broken loss: the best state, no gradient, a quarter of the learning rate.

        Raises:
            NumericsError: it happened before, or no state had a finite held-back loss.
        """
        if self._loss_is_finite:
            return
        if self.restarts or not self.state:
            again = " again, at a quarter of the learning rate" if self.restarts else ""
            where = f"{_said_by(pl_module, 'purpose')}, step {trainer.global_step}"
            raise NumericsError(
                f"{where}: the loss is NaN or infinite{again}.\n"
                f"Lower {_said_by(pl_module, 'lr_key')} and give another --run_dir; what is finished here stays."
            )
        self.restarts += 1
        self._restore(pl_module)
        optimizer.zero_grad()
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group["lr"] *= _SMALLER_STEP
        for config in trainer.lr_scheduler_configs:
            config.scheduler.base_lrs = [lr * _SMALLER_STEP for lr in config.scheduler.base_lrs]
        if is_first():
            _LOG.warning(
                "%s: the loss is NaN or infinite at step %d; it goes on from the best state with a quarter of the step",
                _said_by(pl_module, "purpose"),
                trainer.global_step,
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the best state back.

        Raises:
            NumericsError: no held-back loss was finite.
        """
        if self.state:
            self._restore(pl_module)
        elif self._validated:
            raise NumericsError(
                f"The held-back loss of {_said_by(pl_module, 'purpose')} was never finite: it is {self.first} before "
                "training.\nLook for NaN in the samples held back, or choose others with data.seed."
            )

    def _restore(self, pl_module: pl.LightningModule) -> None:
        parts = self.changing(pl_module)
        with torch.no_grad():
            for name, tensor in self.state.items():
                parts[name].copy_(tensor)


def _said_by(pl_module: pl.LightningModule, attribute: str) -> str:
    return str(getattr(pl_module, attribute, type(pl_module).__name__))
