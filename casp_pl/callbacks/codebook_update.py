"""The V step of PV-tuning (arXiv 2405.14852): move the codes themselves, not only the codebooks, along the gradient."""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from casp_pl.kernels import nearest_entries
from casp_pl.layers import AdditiveLinear

__all__ = ["CodebookUpdate", "update_codes"]


class CodebookUpdate(pl.Callback):
    """Re-encodes the few groups of every additive layer that the straight-through gradient pulls hardest.

    While training runs, the gradient of every dequantized weight is summed. After every `every`-th optimizer step the
    `fraction` of groups with the largest pull gets new codes, nearest to where the pull leads. The best-state callback
    judges the result by the held-back loss, so an update that does not help does not last.

    Args:
        fraction: share of the groups of a layer that may change at a time; 0 switches the callback off.
        every: optimizer steps between two updates.
        step: length of the pull in units of the group's distance to its nearest other entry.
    """

    def __init__(self, *, fraction: float = 0.01, every: int = 20, step: float = 1.0) -> None:
        self.fraction = fraction
        self.every = every
        self.step = step
        self.changed = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to collect gradients."""
        for layer in _additive_layers(pl_module):
            layer.collect_weight_gradient = self.fraction > 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Update every `every` optimizer steps, but not after the last, which nothing could adapt to."""
        step = trainer.global_step
        is_last = 0 < trainer.max_steps <= step
        if self.fraction <= 0 or step % self.every or is_last:
            return
        changed = total = 0
        for layer in _additive_layers(pl_module):
            if layer.weight_gradient is not None:
                changed += update_codes(layer, layer.weight_gradient, fraction=self.fraction, step=self.step)
                layer.weight_gradient = None
            total += layer.codes_unpacked().numel()
        self.changed += changed
        pl_module.log("codebook_update/changed_share", changed / max(1, total))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop collecting and free the sums."""
        for layer in _additive_layers(pl_module):
            layer.collect_weight_gradient = False
            layer.weight_gradient = None


@torch.no_grad()
def update_codes(layer: AdditiveLinear, gradient: Tensor, *, fraction: float, step: float) -> int:
    """One V step on one layer.

    Args:
        layer: its codes are changed in place.
        gradient: (O, I), gradient of the loss with respect to the dequantized weight.
        fraction: share of the groups that may change.
        step: length of the pull relative to the group's distance to its nearest other entry.

    Returns:
        How many codes changed.
    """
    length, scales = layer.group_length, layer.scales
    padded = nn.functional.pad(gradient, (0, layer.groups * length - layer.in_features))
    # in the row's own units, where entries live: W = scale * value, so d loss / d value = scale * d loss / d W
    pull = -(padded * scales).view(layer.out_features * layer.groups, length)
    count = max(1, round(fraction * len(pull)))
    strength, rows = pull.norm(dim=1).topk(count)
    codes = layer.codes_unpacked().long()
    before = codes.clone()
    flat = codes.view(len(pull), layer.num_codebooks)
    chosen = flat[rows]
    value = sum(layer.codebooks[k][chosen[:, k]] for k in range(layer.num_codebooks))
    reach = _nearest_other_distance(layer.codebooks[-1])[chosen[:, -1]]
    target = value + pull[rows] / strength.clamp_min(1e-30)[:, None] * (step * reach)[:, None]
    for _ in range(2):
        for k in range(layer.num_codebooks):
            codebook = layer.codebooks[k]
            rest = target - (value - codebook[chosen[:, k]])
            best = nearest_entries(rest.T.contiguous(), codebook, codebook.square().sum(1))
            value = value + codebook[best] - codebook[chosen[:, k]]
            chosen[:, k] = best
    flat[rows] = chosen
    layer.set_codes(codes.to(torch.uint8))
    return int((codes != before).sum())


def _nearest_other_distance(codebook: Tensor) -> Tensor:
    """(C, D) -> (C,), how far each entry's nearest neighbour is."""
    distances = torch.cdist(codebook, codebook)
    distances.fill_diagonal_(float("inf"))
    return distances.amin(1)


def _additive_layers(module: nn.Module) -> list[AdditiveLinear]:
    return [layer for layer in module.modules() if isinstance(layer, AdditiveLinear)]
