"""The best state is the one of the lowest held-back loss, the state before training included."""

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from casp_pl.callbacks import Advance, BestState


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


@pytest.mark.parametrize(
    ("values", "best"), [([5.0, 3.5, 9.0], 3.5), ([11.0, 12.0, 13.0], 10.0), ([4.0, float("nan"), 6.0], 4.0)]
)
def test_the_lowest_loss_wins(values: list[float], best: float) -> None:
    module, kept, steps = Walk(values), BestState(), []
    trainer = pl.Trainer(
        max_epochs=3,
        callbacks=[kept, Advance(lambda: steps.append(1), loop="train")],
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
    assert module.weight.item() == best
    assert (kept.first, kept.best) == (7.0, abs(best - 3))
    assert len(steps) == 6, "validation batches do not count"
