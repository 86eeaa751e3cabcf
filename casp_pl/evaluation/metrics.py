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
from torchmetrics.utilities import dim_zero_cat

from casp_pl.evaluation.answers import is_yes_no, normalise_answer
from casp_pl.evaluation.bootstrap import interval, resampled_means
from casp_pl.evaluation.scoring import AnswerRule, ExactMatch

__all__ = ["FlipRate", "KLDivergence", "Perplexity", "VQAAccuracy"]


class VQAAccuracy(Metric):
    """Mean score of answers by a rule, with a bootstrap interval over images.

    The questions of one image stand or fall together, so images are drawn, not questions.

    Args:
        rule: scores an answer; `ExactMatch` if not given: the share of answers that are right as normalised text.
        resamples: number of bootstrap resamples.
        confidence: what the interval covers.
        seed: seed of the resampling.
    """

    scores: list[Tensor]
    image: list[Tensor]
    open_ended: list[Tensor]
    full_state_update = False

    def __init__(
        self,
        *,
        rule: AnswerRule | None = None,
        resamples: int = 2000,
        confidence: float = 0.95,
        seed: int = 0,
        **metric: Any,
    ) -> None:
        super().__init__(**metric)
        self.rule = ExactMatch() if rule is None else rule
        self.resamples = resamples
        self.confidence = confidence
        self.seed = seed
        for name in ("scores", "image", "open_ended"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.set_dtype(torch.float64)  # of what a process without questions sends to the others

    def update(self, predictions: Sequence[str], answers: Sequence[str | Sequence[str]], image_numbers: Tensor) -> None:
        """N predictions, N expected answers (or all that count), and (N,) the number of each question's image."""
        accepted = [(answer,) if isinstance(answer, str) else tuple(answer) for answer in answers]
        scores = [self.rule.score(*pair) for pair in zip(predictions, accepted, strict=True)]
        open_ended = [not all(map(is_yes_no, texts)) for texts in accepted]
        self.scores.append(torch.tensor(scores, dtype=torch.float64, device=self.device))
        self.open_ended.append(torch.tensor(open_ended, dtype=torch.float64, device=self.device))
        self.image.append(image_numbers.to(self.device, torch.float64))

    def compute(self) -> dict[str, Any]:
        """accuracy, interval (low, high), accuracy_not_yes_no (None without such questions), questions."""
        scores, open_ended, image = map(dim_zero_cat, (self.scores, self.open_ended, self.image))
        counted = scores[open_ended == 1]
        means = resampled_means(scores, image, resamples=self.resamples, seed=self.seed)
        return {
            "accuracy": scores.mean().item(),
            "interval": interval(means, self.confidence),
            "accuracy_not_yes_no": counted.mean().item() if len(counted) else None,
            "questions": len(scores),
        }


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
