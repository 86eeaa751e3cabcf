import json
import os
import subprocess
import sys

import pytest
import torch

from casp_pl.evaluation import FlipRate, KLDivergence, PairedAccuracy, Perplexity, VQAAccuracy
from casp_pl.evaluation.bootstrap import interval, resampled_means
from casp_pl.evaluation.paired import mcnemar_exact

ROWS = 90


def all_figures(rows):
    """What every metric makes of these of 90 questions, seven at a time."""
    random = torch.Generator().manual_seed(0)
    images = torch.arange(30).repeat_interleave(3)
    first, second = (torch.rand(ROWS, generator=random).mul(11).floor().div(10).clamp(max=1) for _ in range(2))
    logits, theirs = torch.randn(2, ROWS, 7, generator=random)
    said = ["yes" if score > 0.5 else "no" for score in first]
    paired, accuracy, flips, perplexity, kl = (
        PairedAccuracy(), VQAAccuracy(), FlipRate(), Perplexity(), KLDivergence()
    )  # fmt: skip
    torch.nn.ModuleList([paired, accuracy, flips, perplexity, kl]).to("cpu")  # Lightning does so before every stage
    for part in rows.split(7) if len(rows) else []:
        paired.update(first[part].tolist(), second[part].tolist(), images[part])
        words = [said[row] for row in part]
        accuracy.update(words, ["yes"] * len(part), images[part])
        flips.update(words, ["no"] * len(part), images[part])
        perplexity.update(logits[part], images[part] % 7, images[part])
        kl.update(theirs[part], logits[part], images[part])
    figures = {"paired": paired.compute().to_dict(), "accuracy": accuracy.compute()}
    return figures | {"flips": flips.compute(), "perplexity": perplexity.compute(), "kl": kl.compute()}


def as_a_process(rank, store):
    """One of two gloo processes: first with half of the questions, then with all or none of them."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    shares = (torch.arange(ROWS)[rank::2], torch.arange(ROWS)[: ROWS * (1 - rank)])
    print(json.dumps([all_figures(rows) for rows in shares]))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, str(tmp_path / "store")]
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    alone = json.loads(json.dumps(all_figures(torch.arange(ROWS))))
    for figures in (figures for output in outputs for figures in json.loads(output.splitlines()[-1])):
        for name, value in alone.items():
            if isinstance(value, dict):
                assert figures[name].pop("interval") == pytest.approx(value["interval"], abs=1e-12)
                value = {key: part for key, part in value.items() if key != "interval" and part is not None}
                figures[name] = {key: part for key, part in figures[name].items() if part is not None}
            # float32 logarithms of a row depend on where in a chunk it stands
            assert figures[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (5, 5), (8, 1), (3, 20), (130, 90), (0, 2000)])
def test_mcnemar_is_the_binomial_test(first, second):
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with the extra cpu")
    expected = 1.0 if first + second == 0 else stats.binomtest(first, first + second).pvalue
    assert mcnemar_exact(first, second) == pytest.approx(expected, rel=1e-9)


def test_bootstrap_of_single_questions_is_the_normal_interval():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator, dtype=torch.float64)
    means = resampled_means(values, torch.arange(400), resamples=4000, seed=1)
    middle, error = values.mean().item(), (values.std(correction=0) / 20).item()
    assert means.std().item() == pytest.approx(error, rel=0.05)
    low, high = interval(means, 0.95)
    assert (low, high) == pytest.approx([middle - 1.96 * error, middle + 1.96 * error], abs=0.15 * error)


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


if __name__ == "__main__":
    as_a_process(int(sys.argv[2]), sys.argv[1])
