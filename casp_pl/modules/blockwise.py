"""Fine-tuning of one compressed block: it learns to imitate the original block's output (method E)."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from casp_pl.models.streams import BlockBatch, run_block
from casp_pl.modules.parameters import relative_groups, trainable_parameters

__all__ = ["BlockwiseModule", "relative_error"]


def relative_error(output: Tensor, target: Tensor, real: Tensor) -> Tensor:
    """Mean over real tokens of ||output - target||^2 / ||target||^2.

    The next block normalises every token by its own size, so an error counts relative to that; a plain mean square
    would see only the few tokens with massive activations. output, target (B, T, I), real (B, T) bool; a scalar.
    """
    error = (output - target).float().square().sum(-1)
    return (error / target.float().square().sum(-1).clamp_min(1e-12))[real].mean()


class BlockwiseModule(pl.LightningModule):
    """Trains codebooks, scales and norms of one block on cached inputs and outputs.

    Args:
        block: the compressed block.
        train: (inputs behind the compressed prefix, the original block's output) per batch.
        held_back: the same, for early stopping.
        number: the block's number, for the names in the log.
        lr: step of Adam relative to the size of each tensor.
        epochs: passes over the cached batches; early stopping ends sooner.
        patience: validations without a better loss before the block is done.
    """

    def __init__(
        self,
        block: nn.Module,
        train: Sequence[tuple[BlockBatch, Tensor]],
        held_back: Sequence[tuple[BlockBatch, Tensor]],
        *,
        number: int = 0,
        lr: float = 1e-2,
        epochs: int = 4,
        patience: int = 2,
    ) -> None:
        super().__init__()
        self.block = block
        self.lr = lr
        self.epochs = epochs
        self.patience = patience
        self.number = number
        self._train, self._held_back = train, held_back
        trainable_parameters(block)

    def train_dataloader(self) -> DataLoader[Any]:
        """The cached batches in a new order every epoch; the order is seeded by the run's seed."""
        return DataLoader(self._train, batch_size=None, shuffle=True)  # type: ignore[arg-type]  # a sequence will do

    def val_dataloader(self) -> DataLoader[Any]:
        """The batches held back."""
        return DataLoader(self._held_back, batch_size=None)  # type: ignore[arg-type]  # a sequence will do

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Nothing to do: the cached batches lie where the block lies."""
        return batch

    def training_step(self, batch: tuple[BlockBatch, Tensor], batch_idx: int) -> Tensor:
        """Relative error of one batch."""
        loss = self.batch_loss(batch)
        self.log(f"block_tuning/train_{self.number:03d}", loss, batch_size=1)
        return loss

    def validation_step(self, batch: tuple[BlockBatch, Tensor], batch_idx: int) -> None:
        """Relative error of a held-back batch; `val_loss` is what early stopping watches."""
        loss = self.batch_loss(batch)
        self.log("val_loss", loss, batch_size=1, logger=False)
        self.log(f"block_tuning/held_back_{self.number:03d}", loss, batch_size=1)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam with relative steps, decaying along half a cosine to a tenth."""
        parameters = [p for p in self.block.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(relative_groups(parameters, self.lr), betas=(0.9, 0.95))
        steps = max(1, self.epochs * len(self._train))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def batch_loss(self, batch: tuple[BlockBatch, Tensor]) -> Tensor:
        """Relative error of one batch, a scalar."""
        inputs, target = batch
        return relative_error(run_block(self.block, inputs), target, inputs.real)


def _cosine(progress: float, floor: float = 0.1) -> float:
    return floor + (1 - floor) * 0.5 * (1 + torch.cos(torch.tensor(min(progress, 1.0) * torch.pi)).item())
