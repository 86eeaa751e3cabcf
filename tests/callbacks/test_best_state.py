"""The best state is the one of the lowest held-back loss, the state before training included."""

import json

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from casp_pl.callbacks import Advance, BestState
from casp_pl.errors import NumericsError


class Walk(pl.LightningModule):
    """A weight that is set to one given value after the other; its loss is its distance from 3."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(10.0))
        self.values = values
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        with torch.no_grad():
            self.weight.fill_(self.values[self.current_epoch])

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", (self.weight - 3).abs())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(module: pl.LightningModule, callbacks: list[pl.Callback], *, max_epochs: int) -> None:
    """Two steps an epoch; validation before training and after every epoch."""
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        accelerator="cpu",
    )
    loader = DataLoader(torch.zeros(2), batch_size=1)
    trainer.validate(module, dataloaders=loader, verbose=False)
    trainer.fit(module, train_dataloaders=loader, val_dataloaders=loader)


@pytest.mark.parametrize(
    ("values", "best"), [([5.0, 3.5, 9.0], 3.5), ([11.0, 12.0, 13.0], 10.0), ([4.0, float("nan"), 6.0], 4.0)]
)
def test_the_lowest_loss_wins(values: list[float], best: float) -> None:
    module, kept, steps = Walk(values), BestState(), []
    fit(module, [kept, Advance(lambda: steps.append(1), loop="train")], max_epochs=3)
    assert module.weight.item() == best
    assert (kept.first, kept.best) == (7.0, abs(best - 3))
    assert len(steps) == 6, "validation batches do not count"


@pytest.mark.parametrize("codes", [True, False])
def test_codes_are_kept_where_they_change(codes: bool) -> None:
    module, kept = Walk([5.0]), BestState(codes=codes)
    module.register_buffer("codes", torch.arange(3))
    fit(module, [kept], max_epochs=1)
    assert kept.state.keys() == ({"weight", "codes"} if codes else {"weight"})


class Descent(pl.LightningModule):
    """The loss is weight^2, and NaN at the steps in `broken`; the held-back loss is the weight."""

    purpose, lr_key = "a descent", "descent.lr"

    def __init__(self, broken: set[int], held_back: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(8.0))
        self.broken, self.held_back = broken, held_back
        self.seen: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(self.weight.item())
        return self.weight.square() * (float("nan") if len(self.seen) - 1 in self.broken else 1.0)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.weight * self.held_back)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.08, momentum=0.5)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def descended(start: float, lr: float, steps: int) -> list[float]:
    """The same descent by hand."""
    weight, momentum, seen = start, 0.0, [start]
    for _ in range(steps):
        momentum = 0.5 * momentum + 2 * weight
        weight -= lr * momentum
        seen.append(weight)
    return seen


def test_after_a_broken_loss_training_goes_on_from_the_best_state_with_a_quarter_of_the_step() -> None:
    module = Descent(broken={3})
    fit(module, [BestState()], max_epochs=3)
    before = descended(8.0, 0.08, 3)  # the best state is that after two steps, where the first epoch ended
    assert module.seen == pytest.approx([*before, *descended(before[2], 0.02, 1)], rel=1e-6)
    assert module.weight.item() == pytest.approx(descended(before[2], 0.02, 2)[-1], rel=1e-6)


def test_a_second_broken_loss_is_an_error_with_the_key() -> None:
    module = Descent(broken={1, 3})
    with pytest.raises(NumericsError, match="a descent, step 3: .* again, at a quarter") as caught:
        fit(module, [BestState()], max_epochs=3)
    assert "descent.lr" in str(caught.value)
    assert module.weight.isfinite()


def test_a_held_back_loss_that_is_never_finite_is_an_error() -> None:
    with pytest.raises(NumericsError, match="held-back loss of a descent was never finite"):
        fit(Descent(broken=set(), held_back=float("nan")), [BestState()], max_epochs=1)
    with pytest.raises(NumericsError, match="step 0: the loss is NaN"):
        fit(Descent(broken={0}, held_back=float("nan")), [BestState()], max_epochs=1)


def test_losses_that_are_not_finite_are_noted_as_json_and_recalled() -> None:
    kept = BestState()
    fit(Walk([5.0]), [kept], max_epochs=1)
    kept.first = float("nan")
    notes = json.loads(json.dumps(kept.notes(), allow_nan=False))
    again = BestState()
    again.recall(kept.state, notes)
    assert (again.best, again.first, again.restarts) == (kept.best, float("inf"), kept.restarts)
    again.best = float("inf")
    assert json.loads(json.dumps(again.notes(), allow_nan=False))["best"] is None
