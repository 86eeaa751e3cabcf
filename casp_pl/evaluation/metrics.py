"""Metrics of a stage.

Each process evaluates some of the questions and windows (see `EvaluationData`).
Shapes: N questions or positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from casp_pl.evaluation.answers import is_yes_no, normalise_answer

__all__ = ["FlipRate", "KLDivergence", "Perplexity", "VQAAccuracy"]


class VQAAccuracy(Metric):
    """Share of answers that are right as normalised text, with a bootstrap interval over images.

    The questions of one image stand or fall together, so images are drawn, not questions.

    Args:
        resamples: number of bootstrap resamples.
        confidence: what the interval covers.
        seed: seed of the resampling.
    """

    right: list[Tensor]
    image: list[Tensor]
    open_ended: list[Tensor]
    full_state_update = False

    def __init__(self, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0, **metric: Any) -> None:
        super().__init__(**metric)
        self.resamples = resamples
        self.confidence = confidence
        self.seed = seed
        for name in ("right", "image", "open_ended"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, predictions: Sequence[str], answers: Sequence[str], image_numbers: Tensor) -> None:
        """N predictions, N expected answers, and (N,) the number of each question's image."""
        pairs = zip(predictions, answers, strict=True)
        right = [normalise_answer(prediction) == normalise_answer(answer) for prediction, answer in pairs]
        self.right.append(torch.tensor(right))
        self.open_ended.append(torch.tensor([not is_yes_no(answer) for answer in answers]))
        self.image.append(image_numbers.cpu())

    def compute(self) -> dict[str, Any]:
        """accuracy, interval (low, high), accuracy_not_yes_no (None without such questions), questions."""
        right, open_ended, image = (torch.cat(rows) for rows in (self.right, self.open_ended, self.image))
        return {
            "accuracy": right.double().mean().item(),
            "interval": self._interval(right, image),
            "accuracy_not_yes_no": right[open_ended].double().mean().item() if open_ended.any() else None,
            "questions": len(right),
        }

    def _interval(self, right: Tensor, image: Tensor) -> tuple[float, float]:
        _, cluster = torch.unique(image, return_inverse=True)
        asked = torch.bincount(cluster).double()
        hits = torch.bincount(cluster, weights=right.double())
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randint(len(asked), (self.resamples, len(asked)), generator=generator)
        accuracies = hits[drawn].sum(1) / asked[drawn].sum(1)
        tail = (1 - self.confidence) / 2
        low, high = accuracies.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
        return low, high


class FlipRate(Metric):
    """Share of answers that differ, as normalised text, from the original model's."""

    flips: Tensor
    total: Tensor
    full_state_update = False

    def __init__(self, **metric: Any) -> None:
        super().__init__(**metric)
        self.add_state("flips", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], reference: Sequence[str]) -> None:
        """N predictions and the N answers of the original."""
        pairs = zip(predictions, reference, strict=True)
        self.flips += sum(normalise_answer(mine) != normalise_answer(theirs) for mine, theirs in pairs)
        self.total += len(predictions)

    def compute(self) -> float:
        """The share, between 0 and 1."""
        return float(self.flips / self.total)


class Perplexity(Metric):
    """exp of the mean negative log-likelihood of the true next tokens."""

    loss: Tensor
    total: Tensor
    full_state_update = False

    def __init__(self, **metric: Any) -> None:
        super().__init__(**metric)
        self.add_state("loss", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Logits (N, V) and the token that really follows, (N,)."""
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        self.loss += losses.sum(dtype=torch.float64).to(self.loss.device)
        self.total += targets.numel()

    def compute(self) -> float:
        """The perplexity; infinite where it overflows."""
        return float(torch.exp(self.loss / self.total))


class KLDivergence(Metric):
    """Mean of KL(original || model) = sum_v p_v (log p_v - log q_v) over positions, in nats."""

    divergence: Tensor
    total: Tensor
    full_state_update = False

    def __init__(self, **metric: Any) -> None:
        super().__init__(**metric)
        self.add_state("divergence", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, reference_logits: Tensor, logits: Tensor) -> None:
        """Logits of the original and of the model, both (N, V)."""
        reference = reference_logits.float().log_softmax(-1)
        divergence = F.kl_div(logits.float().log_softmax(-1), reference, reduction="none", log_target=True).sum(-1)
        self.divergence += divergence.sum(dtype=torch.float64).to(self.divergence.device)
        self.total += len(logits)

    def compute(self) -> float:
        """The mean, in nats."""
        return float(self.divergence / self.total)
