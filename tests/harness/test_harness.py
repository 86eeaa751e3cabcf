"""lm-eval's and lmms-eval's own command lines and task classes on a model that `fit` saved, with local data only."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from casp_pl import load_compressed
from casp_pl.cli import main
from casp_pl.data import Sample, Turn
from casp_pl.evaluation import evaluate_vqa
from casp_pl.harness.answering import log_likelihoods
from casp_pl.harness.questions import question_sample

WHY = "{} is not installed: make test-harnesses"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
ROWS = [{"question": "two plus two is", "answer": 1}, {"question": "grass is", "answer": 0}]
CHOICES = (" five", " four")
EXACT = "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"


def run(arguments: list[str], cache: Path, *, code: int = 0) -> str:
    environment = os.environ | OFFLINE | {"HF_HOME": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets")}
    command = [sys.executable, "-m", "casp_pl", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout if code == 0 else done.stderr


def log_likelihood(model, tokenizer, text: str, choice: str) -> float:
    """log p(choice | text) from the logits of one forward pass."""
    context, whole = (tokenizer(part)["input_ids"] for part in (text, text + choice))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logits[place - 1, whole[place]].item() for place in range(len(context), len(whole)))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason=WHY.format("lm-eval"))
def test_lm_eval_scores_choices_as_the_logits_do(finished_run: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "local.yaml").write_text(
        f"task: local_choices\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: answer\n"
        f"doc_to_choice: {json.dumps([choice.strip() for choice in CHOICES])}\nmetric_list: [{{metric: acc}}]\n"
    )
    options = ["--tasks", "local_choices", "--include_path", str(tmp_path), "--device", "cpu", "--log_samples"]
    options += ["--batch_size", "3"]
    printed = run(["lm_eval", str(finished_run / "model"), *options, "--output_path", str(tmp_path / "out")], tmp_path)
    assert "local_choices" in printed
    (samples,) = (tmp_path / "out").rglob("samples_local_choices_*.jsonl")
    model, processor = load_compressed(finished_run / "model")
    right = []
    for line in samples.read_text().splitlines():
        row = json.loads(line)
        theirs = [float(answers[0][0]) for answers in row["resps"]]
        text = row["doc"]["question"]
        mine = [log_likelihood(model, processor.tokenizer, text, choice) for choice in CHOICES]
        assert theirs == pytest.approx(mine, rel=1e-3)
        right.append(float(mine.index(max(mine)) == row["doc"]["answer"]))
        assert row["acc"] == right[-1]
    assert len(right) == len(ROWS)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason=WHY.format("lmms-eval"))
def test_lmms_eval_gets_the_answers_that_test_gets(finished_run: Path, tmp_path: Path) -> None:
    samples = []
    for number in range(3):
        path = tmp_path / f"{number}.png"
        Image.effect_mandelbrot((32, 32), (-2, -1.5, 1 - number / 7, 1.5), 100).convert("RGB").save(path)
        samples.append(Sample(id=str(number), turns=(Turn(f"what is number {number}?", "red"),), images=(path,)))
    expected = evaluate_vqa(*load_compressed(finished_run / "model"), samples, max_new_tokens=6).predictions
    # two answers of three are right by construction
    answers = [expected[0], expected[1], "something else"]
    rows = [
        {"question": sample.turns[0].question, "image": str(sample.image), "answer": answer}
        for sample, answer in zip(samples, answers, strict=True)
    ]
    write_task(
        tmp_path, rows, "generate_until", "[Image.open(doc['image'])]", "generation_kwargs: {max_new_tokens: 6}", EXACT
    )
    options = ["--tasks", "local", "--include_path", str(tmp_path), "--device", "cpu", "--log_samples"]
    options += ["--batch_size", "2"]
    run(["lmms_eval", str(finished_run / "model"), *options, "--output_path", str(tmp_path / "out")], tmp_path)
    (results,) = (tmp_path / "out").rglob("*_results.json")
    figures = json.loads(results.read_text())["results"]["local"]
    assert next(value for name, value in figures.items() if name.startswith("exact_match,")) == pytest.approx(2 / 3)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason=WHY.format("lmms-eval"))
def test_lmms_eval_picks_the_likeliest_choice(finished_run: Path, tmp_path: Path) -> None:
    model, processor = load_compressed(finished_run / "model")
    choices = ["red", "a much longer answer", "x"]
    picture = Image.new("RGB", (32, 32), "red")
    picture.save(tmp_path / "red.png")
    asked = ["what?", "what colour is it?"]
    best = []
    for question in asked:
        samples = [question_sample("q", question, [picture], processor, choice) for choice in choices]
        scores = [score for score, _ in log_likelihoods(model, processor, samples)]
        best.append(scores.index(max(scores)))
    # the first expected answer is the likeliest, the second is not
    expected = [best[0], (best[1] + 1) % len(choices)]
    rows = [{"question": question, "answer": answer} for question, answer in zip(asked, expected, strict=True)]
    more = f"doc_to_choice: {json.dumps(choices)}", "metric_list: [{metric: acc}]"
    write_task(tmp_path, rows, "multiple_choice", f"[Image.open({str(tmp_path / 'red.png')!r})]", *more)
    options = ["--tasks", "local", "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "2"]
    run(["lmms_eval", str(finished_run / "model"), *options, "--output_path", str(tmp_path / "out")], tmp_path)
    (results,) = (tmp_path / "out").rglob("*_results.json")
    figures = json.loads(results.read_text())["results"]["local"]
    assert next(value for name, value in figures.items() if name.startswith("acc,")) == 0.5


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason=WHY.format("lmms-eval"))
def test_a_task_that_is_not_possible_ends_with_our_exit_code(finished_run: Path, tmp_path: Path) -> None:
    write_task(tmp_path, [{"question": "what?", "answer": "x"}], "generate_until", "['clip.mp4']", EXACT)
    options = ["--tasks", "local", "--include_path", str(tmp_path), "--device", "cpu"]
    said = run(["lmms_eval", str(finished_run / "model"), *options], tmp_path, code=2)
    assert said.strip().splitlines()[-1] == "lmms_eval: the task shows videos, the model takes images alone"


def write_task(folder: Path, rows: list[dict[str, object]], kind: str, visuals: str, *more: str) -> None:
    """The task `local`; `visuals` is what it shows of a row, as Python, `more` are further lines of its file."""
    data = folder / "rows.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    (folder / "utils.py").write_text(f"from PIL import Image\n\ndef visuals(doc):\n    return {visuals}\n")
    (folder / "local.yaml").write_text(
        f"task: local\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        f"test_split: test\noutput_type: {kind}\ndoc_to_visual: !function utils.visuals\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: answer\n" + "\n".join(more)
    )


@pytest.mark.parametrize("name", ["lm_eval", "lmms_eval"])
def test_what_is_missing_is_said(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    assert f"usage: python -m casp_pl {name} runs/NAME/model --tasks" in capsys.readouterr().err
    assert main([name, str(tmp_path), "--tasks", "x"]) == 3
    assert "no model that casp_pl compressed" in capsys.readouterr().err
