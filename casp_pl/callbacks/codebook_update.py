"""The V step of PV-tuning (arXiv 2405.14852): move the codes themselves, not only the codebooks, along the gradient.

A code changes by a leap, and the leaps of many groups add up in the outputs that they share; a gradient says nothing
about either. So an update is a trial: it stays only if the loss of the last batch falls, and is tried again with fewer
groups if it does not. Without that, updates of 1 % of the groups made a block's held-back error eight times as large.
"""

from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from casp_pl.kernels import nearest_entries
from casp_pl.layers import AdditiveLinear
from casp_pl.processes import mean_of_all

__all__ = ["CodebookUpdate", "Fitted", "update_codes"]

_SMALL = 1e-3  # of the mean square: keeps weights that hardly matter from being pulled without measure
_FEWER = 8  # a rejected update is tried again with so many times fewer groups


class Fitted(Protocol):
    """What the callback needs of a LightningModule: the loss that it trains on, of one batch."""

    def batch_loss(self, batch: Any) -> Tensor:
        """A scalar; of several processes their mean is meant."""


class CodebookUpdate(pl.Callback):
    """Re-encodes the few groups of every additive layer that the straight-through gradient pulls most steadily.

    While training runs, the gradient of every dequantized weight and its square are summed. After every `every`-th
    optimizer step the `fraction` of groups with the largest sum^2 / sum of squares, at most one of a row, gets new
    codes, nearest to where the pull leads.
    What does not lower the loss of the last batch is taken back.

    Args:
        fraction: share of the groups of a layer that may change at a time; 0 switches the callback off.
        every: optimizer steps between two updates.
        step: length of the pull in units of the group's distance to its nearest other entry.
        trials: how often an update is tried, each time with an eighth of the groups.
    """

    def __init__(self, *, fraction: float = 0.01, every: int = 10, step: float = 1.0, trials: int = 3) -> None:
        self.fraction = fraction
        self.every = every
        self.step = step
        self.trials = trials
        self.changed = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to collect gradients."""
        for layer in _additive_layers(pl_module):
            layer.collect_weight_gradient = self.fraction > 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Update every `every` optimizer steps, but not after the last, which nothing could adapt to."""
        step = trainer.global_step
        is_last = 0 < trainer.max_steps <= step
        if self.fraction <= 0 or step % self.every or is_last:
            return
        collected = _additive_layers(pl_module)
        layers = [layer for layer in collected if _is_finite(layer.weight_gradient)]
        with trainer.precision_plugin.forward_context():
            changed = self._try_update(pl_module, layers, batch)
        for layer in collected:
            layer.weight_gradient = None
        self.changed += changed
        total = sum(layer.codes_unpacked().numel() for layer in layers)
        pl_module.log("codebook_update/changed_share", changed / max(1, total))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop collecting and free the sums."""
        for layer in _additive_layers(pl_module):
            layer.collect_weight_gradient = False
            layer.weight_gradient = None

    @torch.no_grad()
    def _try_update(self, module: Fitted, layers: list[AdditiveLinear], batch: object) -> int:
        """Change codes so that the loss of the batch falls; how many changed, 0 if no trial helped."""
        before = float(mean_of_all(module.batch_loss(batch)))
        saved = [layer.codes_unpacked() for layer in layers]
        for trial in range(self.trials):
            fraction, changed = self.fraction / _FEWER**trial, 0
            for layer in layers:
                if layer.weight_gradient is not None:
                    with torch.autocast(layer.codes.device.type, enabled=False):  # entries lie closer than bf16 tells
                        changed += update_codes(layer, layer.weight_gradient, fraction=fraction, step=self.step)
            if float(mean_of_all(module.batch_loss(batch))) < before:
                return changed
            for layer, codes in zip(layers, saved, strict=True):
                layer.set_codes(codes)
        return 0


@torch.no_grad()
def update_codes(layer: AdditiveLinear, gradient: Tensor, *, fraction: float, step: float) -> int:
    """One V step on one layer.

    Args:
        layer: its codes are changed in place.
        gradient: (2, O, I), the gradients of the loss with respect to the dequantized weight, summed over batches, and
            the sum of their squares, which stands for the curvature.
        fraction: share of the groups that may change, at most one of a row.
        step: length of the pull relative to the group's distance to its nearest other entry.

    Returns:
        How many codes changed.
    """
    length, scales = layer.group_length, layer.scales
    padded = nn.functional.pad(gradient, (0, layer.groups * length - layer.in_features))
    total, squares = padded.view(2, layer.out_features, layer.groups, length)
    squares = squares + _SMALL * squares.mean() + torch.finfo(squares.dtype).tiny
    # groups of a row add up in one output: two leaps that are each right can be wrong together
    strength, group = (total.square() / squares).sum(dim=2).max(dim=1)
    count = min(layer.out_features, max(1, round(fraction * layer.out_features * layer.groups)))
    rows = strength.topk(count).indices
    group = group[rows]
    # where entries live, W = scale * value: of the scale of a row only the sign turns a direction
    direction = -total[rows, group] / squares[rows, group] * scales[rows].sign()
    direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-30)
    codes = layer.codes_unpacked().long()
    chosen = codes[rows, group]
    found = _pulled_codes(layer.codebooks, chosen, direction, step)
    codes[rows, group] = found
    layer.set_codes(codes.to(torch.uint8))
    return int((found != chosen).sum())


def _pulled_codes(codebooks: Tensor, chosen: Tensor, direction: Tensor, step: float) -> Tensor:
    """Codes (N, K) nearest to where a pull along `direction` (N, D) leads from the sums of `chosen` (N, K)."""
    chosen = chosen.clone()
    value = torch.stack([codebook[chosen[:, k]] for k, codebook in enumerate(codebooks)]).sum(0)
    reach = _nearest_other_distance(codebooks[-1])[chosen[:, -1]]
    target = value + direction * (step * reach)[:, None]
    for _ in range(2):
        for k, codebook in enumerate(codebooks):
            rest = target - (value - codebook[chosen[:, k]])
            best = nearest_entries(rest.T.contiguous(), codebook, codebook.square().sum(1))
            value = value + codebook[best] - codebook[chosen[:, k]]
            chosen[:, k] = best
    return chosen


def _nearest_other_distance(codebook: Tensor) -> Tensor:
    """(C, D) -> (C,), how far each entry's nearest neighbour is."""
    distances = torch.cdist(codebook, codebook)
    distances.fill_diagonal_(float("inf"))
    return distances.amin(1)


def _is_finite(gradient: Tensor | None) -> bool:
    """Whether a broken loss has not gone into it."""
    return gradient is not None and bool(gradient.isfinite().all())


def _additive_layers(module: nn.Module) -> list[AdditiveLinear]:
    return [layer for layer in module.modules() if isinstance(layer, AdditiveLinear)]
