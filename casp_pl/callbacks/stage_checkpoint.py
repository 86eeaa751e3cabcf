"""A stage of training that was stopped goes on where it stood.

Lightning's own checkpoints are pickles that pass through TMPDIR, and those of divided models have several layouts, some
of which fail on a CPU. These are safetensors in the run directory, one file for all processes where every process holds
the whole model, else one a process.
"""

import logging
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from casp_pl.callbacks.best_state import BestState
from casp_pl.checkpoint import RunDirectory
from casp_pl.errors import StopRun
from casp_pl.layers import AdditiveLinear
from casp_pl.modules.sharding import local, plain_name
from casp_pl.processes import largest_of_all, wait_for_all
from casp_pl.stopping import LateStop

__all__ = ["StageCheckpoint"]

_LOG = logging.getLogger(__name__)
_MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam


class StageCheckpoint(pl.Callback):
    """Saves trained parts, moments of Adam and the best state between two steps, and puts them back.

    It does so every so many steps, and when a SIGTERM or SIGINT reaches any of the processes: the step under way is
    finished, and all of them save and end before the next one.

    What else a step depends on follows from its number: the learning rate, and the batch (a loader that begins at
    `step`). The module is a `EndToEndModule` that is optimized by Adam under a `LambdaLR`.

    Args:
        run: checkpoints are kept there as FOLDER/NNNNNN, NNNNNN the number of finished steps; the last one remains.
        best: keeps the best state; saved along.
        folder: of the stage.
        every: steps between two checkpoints; 0 for none but that of a stop.
        layout: how parameters are divided; a checkpoint of another layout is not read.
        divided: whether every process has tensors of its own.
        saved: is called in every process when a checkpoint is there.

    Attributes:
        step: finished steps to go on from; 0 where no checkpoint fits.
    """

    def __init__(
        self,
        run: RunDirectory,
        best: BestState,
        *,
        folder: str,
        every: int,
        layout: str,
        divided: bool,
        saved: Callable[[], None] | None = None,
    ) -> None:
        self.run = run
        self.best = best
        self.folder = folder
        self.every = every
        self.layout = layout
        self.divided = divided
        self.saved = saved
        self._found = self._find()
        self.step = int(self._found.rsplit("/", 1)[1]) if self._found else 0
        self._stop = LateStop()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Put back what was saved; the trainer counts on from `step`."""
        if self._found is None:
            return
        tensors, notes = self._read(self._found)
        with torch.no_grad():
            self._restore_module(pl_module, _below("now", tensors))
            _restore_optimizer(trainer.optimizers[0], pl_module.blocks, _below("adam", tensors), notes["adam_steps"])
        self.best.recall(_below("best", tensors), notes)
        for name, layer in _additive_layers(pl_module):
            gradient = tensors.get(f"gradient/{name}")
            layer.weight_gradient = None if gradient is None else gradient.to(layer.codes.device)
        _count_on(trainer, self.step, self.best.rate)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """From here on a stop waits for the end of a step."""
        self._stop.begin()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: object, batch_idx: int) -> None:
        """Before a step, when validation and code updates of the one before are done: save, and stop where asked to.

        Raises:
            StopRun: in every process, where one of them was sent a signal.
        """
        self._between_steps(trainer, pl_module, due=self.every > 0 and trainer.global_step % self.every == 0)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """A stop in the last step.

        Raises:
            StopRun: as before a step.
        """
        self._stop.end()
        self._between_steps(trainer, pl_module, due=False)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Signals do again what they did before."""
        self._stop.end()

    def _between_steps(self, trainer: pl.Trainer, module: Any, *, due: bool) -> None:
        number = largest_of_all(self._stop.number, trainer.strategy.root_device)
        if (due or number) and trainer.global_step > self.step:
            self._save(trainer, module, trainer.global_step)
        if number:
            wait_for_all()  # who hears that another has stopped is interrupted, and might not have finished its file
            raise StopRun(number)

    def _find(self) -> str | None:
        names = sorted({name.rsplit("/", 1)[0] for name in self.run.names(self.folder)})
        for name in reversed(names):
            if not self.run.has(name):
                continue
            if self.run.read_tensors(f"{name}/000.safetensors")[1]["layout"] == self.layout:
                return name
            _LOG.warning("%s was saved by other processes than these: the stage begins again", self.run.root / name)
        return None

    def _read(self, name: str) -> tuple[dict[str, Tensor], Any]:
        if self.divided:
            return self.run.read_tensors_of_each(name)
        return self.run.read_tensors(f"{name}/000.safetensors")

    def _save(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        optimizer = trainer.optimizers[0]
        tensors = {f"now/{name}": part.clone() for name, part in self.best.changing(module).items()}
        tensors |= {f"best/{name}": part for name, part in self.best.state.items()}
        for name, parameter in _trained(module.blocks):
            state = optimizer.state.get(parameter) or {}  # none where no part of the parameter is here
            for moment in _MOMENTS:
                tensors[f"adam/{name}/{moment}"] = local(state.get(moment, torch.zeros_like(parameter))).detach()
        for name, layer in _additive_layers(module):
            if layer.weight_gradient is not None:
                tensors[f"gradient/{name}"] = layer.weight_gradient
        made = [int(state["step"]) for state in optimizer.state.values() if state]
        notes: dict[str, Any] = self.best.notes() | {"layout": self.layout, "adam_steps": max(made, default=0)}
        older = sorted({name.rsplit("/", 1)[0] for name in self.run.names(self.folder)})
        name = f"{self.folder}/{step:06d}"
        if name in older:  # of another layout, with which the stage began again
            self.run.discard(name)
            older.remove(name)
        if self.divided:
            self.run.write_tensors_of_each(name, tensors, notes)
        else:
            self.run.write_tensors(f"{name}/000.safetensors", tensors, notes)
        if self.saved is not None:
            self.saved()
        for other in older:
            self.run.discard(other)

    def _restore_module(self, module: nn.Module, saved: dict[str, Tensor]) -> None:
        for name, part in self.best.changing(module).items():
            part.copy_(saved[name])


def _trained(blocks: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(plain_name(name), p) for name, p in blocks.named_parameters() if p.requires_grad]


def _additive_layers(module: nn.Module) -> list[tuple[str, AdditiveLinear]]:
    return [(plain_name(name), layer) for name, layer in module.named_modules() if isinstance(layer, AdditiveLinear)]


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{prefix}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")
    }


def _restore_optimizer(optimizer: Optimizer, blocks: nn.Module, saved: dict[str, Tensor], steps: int) -> None:
    for name, parameter in _trained(blocks):
        moments = {moment: torch.zeros_like(parameter) for moment in _MOMENTS}
        for moment, tensor in moments.items():
            local(tensor).copy_(saved[f"{name}/{moment}"])
        optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **moments}


def _count_on(trainer: pl.Trainer, step: int, rate: float) -> None:
    """The learning rate of the next step, and Lightning's counters, as if `step` steps had been made.

    Args:
        trainer: its optimizer and schedule are set up.
        step: finished steps.
        rate: what learning rates are multiplied with.
    """
    scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
    scheduler.base_lrs = [rate * base for base in scheduler.base_lrs]
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    counted = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    scheduler.load_state_dict(scheduler.state_dict() | counted)
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    loop = trainer.fit_loop.epoch_loop
    made = {"ready": step, "completed": step}
    loop.automatic_optimization.optim_progress.optimizer.step.total.load_state_dict(made)
    loop.batch_progress.total.load_state_dict(made | {"started": step, "processed": step})
    loop._batches_that_stepped = step
