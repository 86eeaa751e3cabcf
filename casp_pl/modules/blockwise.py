"""Fine-tuning of a few neighbouring compressed blocks: together they learn to imitate the original's output (method E).

One block alone can hardly repair what the blocks before it have damaged. Blocks that are tuned together can share the
work, at the same cost a pass: a window of blocks is run, forward and backward, as one (cross-block reconstruction,
BRECQ arXiv 2102.05426, CBQ arXiv 2312.07950).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from casp_pl.models.streams import BlockBatch, run_block
from casp_pl.modules.parameters import relative_groups, trainable_parameters, warmed_cosine
from casp_pl.modules.stage_module import StageModule
from casp_pl.processes import mean_of_all

__all__ = ["BlockwiseModule", "relative_error"]


def relative_error(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over tokens of ||output - target||^2 / ||target||^2.

    The next block normalises every token by its own size, so an error counts relative to that; a plain mean square
    would see only the few tokens with massive activations. output, target (B, T, I), weight (B, T); a scalar. Each
    process has some of the tokens; the mean of their results is that of them all.
    """
    target = target.to(output.device)  # it may have been kept elsewhere
    error = (output - target).float().square().sum(-1) / target.float().square().sum(-1).clamp_min(1e-12)
    return (error * weight).sum() / mean_of_all(weight.sum())


class BlockwiseModule(StageModule):
    """Trains codebooks, scales and norms of neighbouring blocks on cached inputs and outputs.

    Args:
        blocks: the compressed blocks of the window, in order.
        train: (inputs of the first block behind the compressed prefix, the original's output of the last) per batch.
        held_back: the same for early stopping, with the original's output of every block.
        first: number of the first block, for the names in the log.
        seed: decides in which order training sees the batches, in every process the same.
        lr: step of Adam relative to the size of each tensor.
        epochs: passes over the cached batches; early stopping ends sooner.
        warmup: share of the steps over which the learning rate rises.
        patience: validations without a better loss before the window is done.
        image_weight: what an image token counts beside a token of text. The trace of the Fisher information of a
            relative error says less the deeper the block: about 1/8 in blocks 1 to 11 of the embedded model, 1/50 in
            block 20, 1/2000 in block 28.

    Attributes:
        halvings: 0 for whole batches; n where memory is short: 2^-n of a batch at a time, computed again for its
            backward pass. The loss stays that of the whole batch.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        train: Sequence[tuple[BlockBatch, Tensor]],
        held_back: Sequence[tuple[BlockBatch, Sequence[Tensor]]],
        *,
        first: int = 0,
        seed: int = 0,
        lr: float = 4e-3,
        epochs: int = 2,
        warmup: float = 0.2,
        patience: int = 2,
        image_weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.first = first
        self.seed = seed
        self.lr = lr
        self.epochs = epochs
        self.warmup = warmup
        self.patience = patience
        self.image_weight = image_weight
        self.halvings = 0
        self._train, self._held_back = train, held_back
        trainable_parameters(self.blocks)

    @property
    def purpose(self) -> str:
        """What is trained, for messages."""
        return f"block tuning (blocks {self.first} to {self.first + len(self.blocks) - 1})"

    @property
    def lr_key(self) -> str:
        """The key of the learning rate in a recipe."""
        return "block_tuning.lr"

    @property
    def largest_batch(self) -> int:
        """Samples of the largest batch of training."""
        return max(len(inputs) for inputs, _ in self._train)

    def train_dataloader(self) -> DataLoader[Any]:
        """The cached batches in a new order every epoch."""
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self._train, batch_size=None, shuffle=True, generator=order)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """The batches held back."""
        return DataLoader(self._held_back, batch_size=None)  # type: ignore[arg-type]  # a sequence will do

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Nothing to do: the cached batches lie where the blocks lie."""
        return batch

    def training_step(self, batch: tuple[BlockBatch, Tensor], batch_idx: int) -> Tensor:
        """Relative error of one batch behind the last block."""
        loss = self.batch_loss(batch)
        self.log(f"block_tuning/train_{self.first + len(self.blocks) - 1:03d}", loss, batch_size=1, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[BlockBatch, Sequence[Tensor]], batch_idx: int) -> None:
        """Relative error of a held-back batch behind every block; early stopping watches the last as `val_loss`."""
        inputs, targets = batch
        outputs = self._outputs(inputs)
        for number, (output, target) in enumerate(zip(outputs, targets, strict=True), start=self.first):
            loss = relative_error(output, target, self._weight(inputs))
            self.log(f"block_tuning/held_back_{number:03d}", loss, batch_size=1, sync_dist=True)
        self.log("val_loss", loss, batch_size=1, logger=False, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam with relative steps, a short rise, then half a cosine."""
        parameters = [p for p in self.blocks.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(relative_groups(parameters, self.lr), betas=(0.9, 0.95))
        schedule = warmed_cosine(optimizer, self.epochs * len(self._train), self.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def batch_loss(self, batch: tuple[BlockBatch, Tensor]) -> Tensor:
        """Relative error of one batch behind the last block, a scalar."""
        inputs, target = batch
        *_, output = self._outputs(inputs)
        return relative_error(output, target, self._weight(inputs))

    def _outputs(self, inputs: BlockBatch) -> Iterator[Tensor]:
        """Output (B, T, I) of every block in turn."""
        inputs = inputs.widened()
        for block in self.blocks:
            inputs = inputs.with_hidden(_in_parts(block, inputs, self.halvings))
            yield inputs.hidden

    def _weight(self, batch: BlockBatch) -> Tensor:
        """(B, T): 1 for text, `image_weight` for image patches, 0 for padding."""
        return batch.real * torch.where(batch.image, self.image_weight, 1.0)


def _in_parts(block: nn.Module, batch: BlockBatch, halvings: int) -> Tensor:
    """`run_block` of a half, a quarter ... of the samples at a time; backward computes each again when it needs it."""
    if halvings == 0 or len(batch) < 2:
        return checkpoint(run_block, block, batch, use_reentrant=False) if halvings else run_block(block, batch)
    return torch.cat([_in_parts(block, half, halvings - 1) for half in batch.halves()])
