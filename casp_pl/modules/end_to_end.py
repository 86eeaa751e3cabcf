"""End-to-end fine-tuning of the whole compressed model against the original's logits (method E)."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from casp_pl.kernels import head_divergence
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.streams import model_inputs
from casp_pl.modules.parameters import relative_groups, trainable_parameters

__all__ = ["EndToEndModule", "final_states", "teacher_states", "text_mask"]


@torch.no_grad()
def teacher_states(adapter: ModelAdapter, batches: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The original's final hidden states at text tokens, by sample id: each (text tokens of the sample, I).

    The output head is never compressed, so these few numbers give the original's logits exactly, at 1/85 of their size.
    """
    states: dict[str, Tensor] = {}
    for batch in batches:
        hidden, text = final_states(adapter, batch), text_mask(adapter, batch)
        for row, sample in enumerate(batch["sample_ids"]):
            states[sample] = hidden[row][text[row]].cpu()
    return states


def final_states(adapter: ModelAdapter, batch: Mapping[str, Any]) -> Tensor:
    """Hidden states after the final norm, (B, T, I)."""
    inner = getattr(adapter.model, "model", adapter.model)
    states: Tensor = inner(**model_inputs(batch), use_cache=False).last_hidden_state
    return states


def text_mask(adapter: ModelAdapter, batch: Mapping[str, Any]) -> Tensor:
    """True at real tokens that are not image patches: (B, T) bool."""
    real: Tensor = batch["attention_mask"].bool()
    return real & ~adapter.image_mask(batch["input_ids"])


class EndToEndModule(pl.LightningModule):
    """Trains codebooks, scales and norms of all blocks; loss = KL to the original's logits at text tokens.

    Args:
        adapter: the model with its compressed blocks in place.
        teacher: the original's final hidden states by sample id, see `teacher_states`.
        lr: step of Adam relative to the size of each tensor.
        steps: optimizer steps.
        warmup: share of the steps over which the learning rate rises.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        teacher: Mapping[str, Tensor],
        *,
        lr: float = 1e-3,
        steps: int = 40,
        warmup: float = 0.1,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.blocks = adapter.blocks
        self.teacher = teacher
        self.lr = lr
        self.steps = steps
        self.warmup = warmup
        trainable_parameters(self.blocks)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """KL of one batch."""
        loss = self.batch_loss(batch)
        self.log("end_to_end/train_kl", loss, batch_size=1)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """KL of a held-back batch; `val_loss` is what the best state is kept by."""
        loss = self.batch_loss(batch)
        tokens = int(text_mask(self.adapter, batch).sum())
        self.log("val_loss", loss, batch_size=tokens, logger=False)
        self.log("end_to_end/held_back_kl", loss, batch_size=tokens)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam with relative steps, a short warm-up, then linear decay."""
        parameters = [p for p in self.blocks.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(relative_groups(parameters, self.lr), betas=(0.9, 0.95))
        rise = max(1, round(self.warmup * self.steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / rise, max(0.05, 1 - (step - rise) / max(1, self.steps - rise)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def batch_loss(self, batch: dict[str, Any]) -> Tensor:
        """KL of one batch in nats, a scalar."""
        student = final_states(self.adapter, batch)[text_mask(self.adapter, batch)]
        teacher = torch.cat([self.teacher[sample] for sample in batch["sample_ids"]]).to(student)
        return head_divergence(student, teacher, self.adapter.head.weight)
