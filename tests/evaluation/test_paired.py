import json
import os
import subprocess
import sys

import pytest
import torch

from casp_pl.evaluation import PairedAccuracy
from casp_pl.evaluation.bootstrap import interval, resampled_means
from casp_pl.evaluation.paired import mcnemar_exact

TWO_PROCESSES = """
import json, sys
import torch, torch.distributed as dist
from casp_pl.evaluation import FlipRate, KLDivergence, PairedAccuracy, Perplexity, VQAAccuracy

rank, count, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if count > 1:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
random = torch.Generator().manual_seed(0)
images = torch.arange(30).repeat_interleave(3)
first, second = (torch.rand(90, generator=random).mul(11).floor().div(10).clamp(max=1) for _ in range(2))
logits, theirs = torch.randn(2, 90, 7, generator=random)
said = ["yes" if score > 0.5 else "no" for score in first]
paired, accuracy, flips = PairedAccuracy(), VQAAccuracy(), FlipRate()
perplexity, kl = Perplexity(), KLDivergence()
mine = torch.arange(90)[rank::count] if sys.argv[4] == "even" else torch.arange(90)[: 90 * (rank == 0)]
for rows in mine.split(7) if len(mine) else []:
    paired.update(first[rows].tolist(), second[rows].tolist(), images[rows])
    words = [said[row] for row in rows]
    accuracy.update(words, ["yes"] * len(rows), images[rows])
    flips.update(words, ["no"] * len(rows))
    perplexity.update(logits[rows], images[rows] % 7)
    kl.update(theirs[rows], logits[rows])
figures = {"paired": paired.compute().to_dict(), "accuracy": accuracy.compute()}
figures |= {"flips": flips.compute(), "perplexity": perplexity.compute(), "kl": kl.compute()}
print(json.dumps(figures))
"""


def run_processes(count, tmp_path, share="even"):
    """What each of `count` gloo processes computes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", TWO_PROCESSES]
    store = tmp_path / f"store-{count}-{share}"
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(count), str(store), share], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("share", ["even", "one process has nothing"])
def test_two_processes_compute_what_one_does(share, tmp_path):
    (alone,) = run_processes(1, tmp_path)
    for figures in run_processes(2, tmp_path, share):
        for name in ("flips", "perplexity", "kl"):
            assert figures[name] == pytest.approx(alone[name], rel=1e-12)
        assert figures["accuracy"] == alone["accuracy"]
        interval, expected = figures["paired"].pop("interval"), alone["paired"]["interval"]
        assert interval == pytest.approx(expected, abs=1e-12)
        rest = {name: value for name, value in alone["paired"].items() if name != "interval"}
        assert figures["paired"] == pytest.approx(rest)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (5, 5), (8, 1), (3, 20), (130, 90), (0, 2000)])
def test_mcnemar_is_the_binomial_test(first, second):
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with the extra cpu")
    expected = 1.0 if first + second == 0 else stats.binomtest(first, first + second).pvalue
    assert mcnemar_exact(first, second) == pytest.approx(expected, rel=1e-9)


def test_bootstrap_of_single_questions_is_the_normal_interval():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator, dtype=torch.float64)
    means = resampled_means(values, torch.arange(400), resamples=4000, seed=1)
    error = (values.std(correction=0) / 20).item()
    assert means.std().item() == pytest.approx(error, rel=0.05)
    low, high = interval(means, 0.95)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)


def test_bootstrap_draws_whole_images():
    values = torch.tensor([1.0, 1, 1, 0, 0, 0])
    means = resampled_means(values, torch.tensor([7, 7, 7, 2, 2, 2]), resamples=500, seed=0)
    assert set(means.tolist()) == {0.0, 0.5, 1.0}
    assert means.mean().item() == pytest.approx(0.5, abs=0.07)


def test_resamples_in_pieces_are_those_at_once(monkeypatch):
    values, images = torch.rand(50), torch.arange(50) // 2
    whole = resampled_means(values, images, resamples=301, seed=3)
    monkeypatch.setattr("casp_pl.evaluation.bootstrap._AT_ONCE", 25 * 40)
    assert torch.equal(resampled_means(values, images, resamples=301, seed=3), whole)


def test_the_paired_interval_is_narrower_than_two_separate_ones():
    generator = torch.Generator().manual_seed(0)
    hard = torch.rand(600, generator=generator) < 0.4
    original = (~hard).double()
    compressed = original.clone()
    compressed[:12] = 1 - compressed[:12]
    images = torch.arange(600) // 3
    metric = PairedAccuracy()
    for rows in torch.arange(600).split(100):
        metric.update(original[rows].tolist(), compressed[rows].tolist(), images[rows])
    figures = metric.compute()
    assert figures.difference == pytest.approx((compressed - original).mean().item())
    assert figures.both + figures.only_original + figures.only_compressed + figures.neither == 600
    assert figures.only_original + figures.only_compressed == 12
    assert figures.mcnemar_p == mcnemar_exact(figures.only_original, figures.only_compressed)
    low, high = figures.interval
    assert low <= figures.difference <= high
    alone = resampled_means(original, images, resamples=2000, seed=0)
    assert high - low < 0.5 * (interval(alone, 0.95)[1] - interval(alone, 0.95)[0])


def test_the_same_answers_differ_by_nothing():
    metric = PairedAccuracy()
    metric.update([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], torch.tensor([0, 1, 1]))
    figures = metric.compute()
    assert (figures.difference, figures.interval, figures.mcnemar_p) == (0, (0, 0), 1)


def test_parts_of_a_score_have_no_mcnemar_test():
    metric = PairedAccuracy()
    metric.update([0.3, 1.0], [0.6, 1.0], torch.tensor([0, 1]))
    assert metric.compute().mcnemar_p is None
    assert metric.compute().difference == pytest.approx(0.15)
