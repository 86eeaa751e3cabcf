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
        mine.update(logits[row], targets[row], torch.full((7,), row))
    theirs.update(logits, targets)
    assert mine.compute()["perplexity"] == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_kl_is_the_dense_sum():
    torch.manual_seed(0)
    theirs, ours = torch.randn(2, 13, 17)
    metric = KLDivergence()
    metric.update(theirs[:5], ours[:5], torch.zeros(5))
    metric.update(theirs[5:], ours[5:], torch.zeros(8))
    p, q = theirs.double().softmax(-1), ours.double().softmax(-1)
    found = metric.compute()
    assert found["kl"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    assert found["interval"] is None, "one unit alone says nothing about others"
    same = KLDivergence()
    same.update(ours, ours, torch.arange(13))
    assert same.compute() == {"kl": 0, "interval": (0, 0)}


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
    metric.update(["Yes.", "red"], ["yes", "blue"], torch.tensor([0, 1]))
    metric.update(["a circle"], ["circle"], torch.tensor([2]))
    assert metric.compute()["flip_rate"] == pytest.approx(1 / 3)


def test_intervals_of_text_are_those_of_a_plain_bootstrap_over_windows():
    generator = torch.Generator().manual_seed(2)
    windows, length, vocabulary = 30, 8, 5
    numbers = torch.arange(windows).repeat_interleave(length)
    ease = torch.randn(windows, generator=generator)[numbers]  # windows differ much more than their tokens do
    targets = torch.randint(vocabulary, (len(numbers),), generator=generator)
    logits = torch.randn(len(numbers), vocabulary, generator=generator) / 4
    logits[torch.arange(len(numbers)), targets] += 2 * ease
    theirs = torch.zeros_like(logits)
    perplexity, kl = Perplexity(resamples=4000), KLDivergence(resamples=4000)
    perplexity.update(logits, targets, numbers)
    kl.update(theirs, logits, numbers)
    scores = logits.double().log_softmax(-1)
    losses = -scores[torch.arange(len(numbers)), targets].view(windows, length).mean(1)
    divergences = (-math.log(vocabulary) - scores.mean(-1)).view(windows, length).mean(1)
    drawn = torch.randint(windows, (4000, windows), generator=generator)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    expected = losses[drawn].mean(1).exp().quantile(ends), divergences[drawn].mean(1).quantile(ends)
    for found, (low, high) in zip(
        (perplexity.compute(), kl.compute()), map(torch.Tensor.tolist, expected), strict=True
    ):
        assert found["interval"] == pytest.approx((low, high), abs=0.06 * (high - low))
    loss, scatter = losses.mean().item(), losses.std().item() / math.sqrt(windows)
    width = math.exp(loss + 1.96 * scatter) - math.exp(loss - 1.96 * scatter)
    assert perplexity.compute()["perplexity"] == pytest.approx(math.exp(loss))
    assert expected[0][1] - expected[0][0] == pytest.approx(width, rel=0.2)
