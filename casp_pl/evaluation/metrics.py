"""Metrics of a stage.

Each process evaluates some of the questions and windows (see `EvaluationData`).
Shapes: N questions or positions, V vocabulary.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from casp_pl.evaluation.answers import is_yes_no, normalise_answer
from casp_pl.evaluation.bootstrap import interval, resampled_means
from casp_pl.evaluation.scoring import AnswerRule, ExactMatch
from casp_pl.evaluation.wide_metric import WideMetric

__all__ = ["FlipRate", "KLDivergence", "Perplexity", "VQAAccuracy"]

_LARGEST_EXPONENT = math.log(sys.float_info.max)


class VQAAccuracy(WideMetric):
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


class _ResampledMean(WideMetric):
    """Mean of values with a bootstrap interval over the units that they stand or fall with: images, windows of text.

    Args:
        resamples: number of bootstrap resamples.
        confidence: what the interval covers.
        seed: seed of the resampling.
    """

    values: list[Tensor]
    unit: list[Tensor]

    def __init__(self, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0, **metric: Any) -> None:
        super().__init__(**metric)
        self.resamples = resamples
        self.confidence = confidence
        self.seed = seed
        for name in ("values", "unit"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def _add(self, values: Tensor, units: Tensor) -> None:
        """(N,) values and the number of each value's unit."""
        self.values.append(values.to(self.device, torch.float64))
        self.unit.append(units.to(self.device, torch.float64))

    def _mean(self) -> tuple[float, tuple[float, float] | None]:
        """The mean and its interval, None where there is one unit alone."""
        values, unit = dim_zero_cat(self.values), dim_zero_cat(self.unit)
        mean = values.mean().item()
        if len(torch.unique(unit)) < 2:
            return mean, None
        means = resampled_means(values, unit, resamples=self.resamples, seed=self.seed)
        return mean, interval(means, self.confidence)


class FlipRate(_ResampledMean):
    """Share of answers that differ, as normalised text, from the original model's; arguments as `_ResampledMean`."""

    def update(self, predictions: Sequence[str], reference: Sequence[str], image_numbers: Tensor) -> None:
        """N predictions, the N answers of the original, and (N,) the number of each question's image."""
        pairs = zip(predictions, reference, strict=True)
        flips = [normalise_answer(mine) != normalise_answer(theirs) for mine, theirs in pairs]
        self._add(torch.tensor(flips), image_numbers)

    def compute(self) -> dict[str, Any]:
        """flip_rate, between 0 and 1, and its interval (low, high)."""
        share, ends = self._mean()
        return {"flip_rate": share, "interval": ends}


class Perplexity(_ResampledMean):
    """exp of the mean negative log-likelihood of the true next tokens; arguments as `_ResampledMean`."""

    def update(self, logits: Tensor, targets: Tensor, window_numbers: Tensor) -> None:
        """Logits (N, V), the token that really follows, (N,), and the number of each position's window, (N,)."""
        self._add(F.cross_entropy(logits.float(), targets, reduction="none"), window_numbers)

    def compute(self) -> dict[str, Any]:
        """perplexity, infinite where it overflows, and its interval (low, high)."""
        loss, ends = self._mean()
        return {"perplexity": _exp(loss), "interval": None if ends is None else (_exp(ends[0]), _exp(ends[1]))}


class KLDivergence(_ResampledMean):
    """Mean of KL(original || model) = sum_v p_v (log p_v - log q_v) over positions, in nats.

    Arguments as `_ResampledMean`.
    """

    def update(self, reference_logits: Tensor, logits: Tensor, units: Tensor) -> None:
        """Logits of the original and of the model, both (N, V), and the number of each position's unit, (N,)."""
        reference = reference_logits.float().log_softmax(-1)
        divergence = F.kl_div(logits.float().log_softmax(-1), reference, reduction="none", log_target=True).sum(-1)
        self._add(divergence, units)

    def compute(self) -> dict[str, Any]:
        """The mean as `kl`, in nats, and its interval (low, high)."""
        mean, ends = self._mean()
        return {"kl": mean, "interval": ends}


def _exp(value: float) -> float:
    return math.exp(value) if value < _LARGEST_EXPONENT else math.inf
