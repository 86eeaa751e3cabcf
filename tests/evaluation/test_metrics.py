import math

import pytest
import torch
from torchmetrics.text import Perplexity as TorchmetricsPerplexity

from casp_pl.evaluation import FlipRate, KLDivergence, Perplexity, VQAAccuracy


def test_perplexity_is_that_of_torchmetrics():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 7, 11) * 3, torch.randint(11, (3, 7))
    mine, theirs = Perplexity(), TorchmetricsPerplexity()
    for row in range(3):
        mine.update(logits[row], targets[row])
    theirs.update(logits, targets)
    assert mine.compute() == pytest.approx(theirs.compute().item(), rel=1e-6)
    assert int(mine.total) == 21


def test_kl_is_the_dense_sum():
    torch.manual_seed(0)
    theirs, ours = torch.randn(2, 13, 17)
    metric = KLDivergence()
    metric.update(theirs[:5], ours[:5])
    metric.update(theirs[5:], ours[5:])
    p, q = theirs.double().softmax(-1), ours.double().softmax(-1)
    assert metric.compute() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    same = KLDivergence()
    same.update(ours, ours)
    assert same.compute() == 0


def test_accuracy():
    metric = VQAAccuracy()
    metric.update(["Yes", "red"], ["yes", "blue"], torch.tensor([4, 4]))
    metric.update(["a circle", "no", "teal"], ["circle", "yes", "teal"], torch.tensor([9, 9, 1]))
    result = metric.compute()
    assert result["accuracy"] == pytest.approx(3 / 5)
    assert result["accuracy_not_yes_no"] == pytest.approx(2 / 3)
    assert result["questions"] == 5
    only_yes = VQAAccuracy()
    only_yes.update(["yes"], ["yes"], torch.tensor([0]))
    assert only_yes.compute()["accuracy_not_yes_no"] is None


def test_interval_is_that_of_a_plain_bootstrap_over_images():
    generator = torch.Generator().manual_seed(1)
    images = torch.arange(40).repeat_interleave(torch.randint(5, 15, (40,), generator=generator))
    ability = torch.rand(40, generator=generator)
    right = torch.rand(len(images), generator=generator) < ability[images]
    metric = VQAAccuracy(resamples=4000)
    metric.update(["x" if hit else "y" for hit in right], ["x"] * len(right), images)
    low, high = metric.compute()["interval"]

    shares = []
    for _ in range(2000):
        drawn = torch.randint(40, (40,), generator=generator).tolist()
        hits = [right[images == image] for image in drawn]
        shares.append(torch.cat(hits).double().mean())
    expected = torch.stack(shares).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert (low, high) == pytest.approx(expected.tolist(), abs=0.015)
    binomial = 1.96 * math.sqrt(right.double().mean() * (1 - right.double().mean()) / len(right))
    assert high - low > 1.5 * 2 * binomial  # questions of one image are not independent
    assert (low, high) == metric.compute()["interval"]


def test_flip_rate_compares_normalised_text():
    metric = FlipRate()
    metric.update(["Yes.", "red"], ["yes", "blue"])
    metric.update(["a circle"], ["circle"])
    assert metric.compute() == pytest.approx(1 / 3)
