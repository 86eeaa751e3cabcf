"""Two models on the same questions: the difference of their scores, question by question.

Each question is asked twice, so what makes it hard cancels out: the interval of the difference is much narrower than
the intervals of the two accuracies suggest.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from casp_pl.evaluation.bootstrap import interval, resampled_means
from casp_pl.evaluation.wide_metric import WideMetric

__all__ = ["PairedAccuracy", "PairedFigures", "mcnemar_exact"]


class PairedFigures(NamedTuple):
    """Compressed minus original.

    Attributes:
        questions: N.
        images: on which they are.
        original: mean score of the original.
        compressed: mean score of the compressed model.
        difference: compressed minus original.
        interval: its 95 % interval (low, high), by a bootstrap over images.
        both: questions that both answer right (with a score of 1).
        only_original: that only the original answers right.
        only_compressed: that only the compressed model answers right.
        neither: the rest.
        mcnemar_p: probability of a split of those two counts at least as uneven if both were equally likely; None
            where the rule gives part of a score, for which the test is not made.
    """

    questions: int
    images: int
    original: float
    compressed: float
    difference: float
    interval: tuple[float, float]
    both: int
    only_original: int
    only_compressed: int
    neither: int
    mcnemar_p: float | None

    def to_dict(self) -> dict[str, Any]:
        """All figures by name, ready for JSON."""
        return self._asdict()


class PairedAccuracy(WideMetric):
    """Difference of the mean scores of two models, with a bootstrap interval over images and McNemar's exact test.

    Args:
        resamples: number of bootstrap resamples.
        confidence: what the interval covers.
        seed: seed of the resampling.
    """

    original: list[Tensor]
    compressed: list[Tensor]
    image: list[Tensor]

    def __init__(self, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0, **metric: Any) -> None:
        super().__init__(**metric)
        self.resamples = resamples
        self.confidence = confidence
        self.seed = seed
        for name in ("original", "compressed", "image"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, original: Sequence[float], compressed: Sequence[float], image_numbers: Tensor) -> None:
        """N scores of each model, and (N,) the number of each question's image."""
        for state, scores in ((self.original, original), (self.compressed, compressed)):
            state.append(torch.tensor(scores, dtype=torch.float64, device=self.device))
        self.image.append(image_numbers.to(self.device, torch.float64))

    def compute(self) -> PairedFigures:
        """The comparison over the questions of all processes."""
        original, compressed, image = map(dim_zero_cat, (self.original, self.compressed, self.image))
        means = resampled_means(compressed - original, image, resamples=self.resamples, seed=self.seed)
        right = original == 1, compressed == 1
        only_original, only_compressed = (int((mine & ~other).sum()) for mine, other in (right, right[::-1]))
        both = int((right[0] & right[1]).sum())
        whole = bool((torch.isin(torch.cat([original, compressed]), torch.tensor([0.0, 1.0]).to(original))).all())
        return PairedFigures(
            questions=len(original),
            images=len(torch.unique(image)),
            original=original.mean().item(),
            compressed=compressed.mean().item(),
            difference=(compressed - original).mean().item(),
            interval=interval(means, self.confidence),
            both=both,
            only_original=only_original,
            only_compressed=only_compressed,
            neither=len(original) - both - only_original - only_compressed,
            mcnemar_p=mcnemar_exact(only_original, only_compressed) if whole else None,
        )


def mcnemar_exact(first: int, second: int) -> float:
    """Two-sided p of McNemar's exact test (1947): `first` and `second` questions that only one model answers right.

    If neither model were better, each of these n questions would be a fair coin: p = 2 sum_{i <= min} C(n, i) / 2^n, at
    most 1. Questions are taken as independent, which those about one image are not: the interval over images is the
    safer of the two.
    """
    n = first + second
    tail, term = 0, 1
    for count in range(min(first, second) + 1):
        tail += term
        term = term * (n - count) // (count + 1)
    return min(1.0, 2 * tail / (1 << n))
