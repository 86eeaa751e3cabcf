"""The real `test` command on the tiny model: both models on the same samples, benchmarks from their own files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from casp_pl.checkpoint import save_compressed
from casp_pl.cli import main
from casp_pl.data.sources import EasyVQA
from casp_pl.models.adapter import adapt
from casp_pl.models.compress import round_to_nearest
from casp_pl.models.tiny import load_tiny
from casp_pl.quantizers import RTNQuantizer

ROOT = Path(__file__).parents[2]
WORDS = ("yes", "no", "red", "circle")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(3):
        Image.effect_mandelbrot((40, 32), (-2, -1.5, 1 - number / 7, 1.5), 100).convert("RGB").save(
            folder / f"{number}.jpg"
        )
    return folder


def write_benchmark(name: str, folder: Path, images: Path) -> list[str]:
    """Six questions about three images in the benchmark's own files, and the options that point to them."""
    asked = [(number, f"Is there a {WORDS[number % 4]} number {number}?", number // 2) for number in range(6)]
    options = {"path": folder / "questions.json", "image_folder": images}
    content: object = None
    if name == "pope":
        rows = [
            {"question_id": n, "image": f"{i}.jpg", "text": q, "label": "yes" if n % 2 else "no"} for n, q, i in asked
        ]
        (folder / "coco_pope_random.json").write_text("\n".join(map(json.dumps, rows)))
        options["path"] = folder
    elif name == "gqa":
        content = {
            str(n): {"question": q, "imageId": str(i), "answer": "red", "types": {"structural": "query"}}
            for n, q, i in asked
        }
    elif name == "mme":
        for image in range(3):
            lines = [f"{q} Please answer yes or no.\t{'No' if n % 2 else 'Yes'}" for n, q, i in asked if i == image]
            (folder / "count").mkdir(exist_ok=True)
            (folder / "count" / f"{image}.txt").write_text("\n".join(lines))
            (folder / "count" / f"{image}.jpg").write_bytes((images / f"{image}.jpg").read_bytes())
        options = {"path": folder}
    elif name == "science_qa":
        row = {"choices": ["red", "blue"], "answer": 1, "hint": "", "image": "image.png", "subject": "art"}
        (folder / "problems.json").write_text(json.dumps({str(n): row | {"question": q} for n, q, _ in asked}))
        (folder / "pid_splits.json").write_text(json.dumps({"test": [str(n) for n, _, _ in asked]}))
        for n, _, i in asked:
            (folder / "test" / str(n)).mkdir(parents=True)
            Image.open(images / f"{i}.jpg").save(folder / "test" / str(n) / "image.png")
        options = {"path": folder, "image_folder": folder}
    elif name == "seed_bench":
        row = {f"choice_{letter}": WORDS[place] for place, letter in enumerate("abcd")}
        row |= {"answer": "A", "data_type": "image", "question_type_id": 5}
        rows = [row | {"question_id": str(n), "question": q, "data_id": f"{i}.jpg"} for n, q, i in asked]
        content = {"questions": rows, "question_type": {"Instances Counting": 5}}
    elif name == "text_vqa":
        rows = [{"question_id": n, "image_id": str(i), "question": q, "answers": ["red"] * 10} for n, q, i in asked]
        content = {"data": rows}
        ocr = [{"image_id": str(i), "ocr_tokens": ["RED", "3"]} for i in range(3)]
        (folder / "ocr.json").write_text(json.dumps({"data": ocr}))
        options["ocr_path"] = folder / "ocr.json"
    else:
        content = {"questions": [{"image_id": i, "question": q, "question_id": n} for n, q, i in asked]}
        answers = [{"answer": "red", "answer_id": number} for number in range(10)]
        given = [{"question_id": n, "answer_type": "other", "answers": answers} for n, _, _ in asked]
        (folder / "annotations.json").write_text(json.dumps({"annotations": given}))
        options |= {"annotations": folder / "annotations.json", "image_name": "{}.jpg"}
    if content is not None:
        (folder / "questions.json").write_text(json.dumps(content))
    return [part for key, value in options.items() for part in (f"--evaluation.source.init_args.{key}", str(value))]


@pytest.mark.parametrize(
    ("name", "file", "figure"),
    [
        ("pope", "POPE", "F1"),
        ("gqa", "GQA", "accuracy, query"),
        ("mme", "MME", "score, perception"),
        ("science_qa", "ScienceQA", "accuracy, art"),
        ("seed_bench", "SEEDBench", "accuracy, Instances Counting"),
        ("text_vqa", "TextVQA", None),
        ("vqa_v2", "VQAv2", "accuracy, other"),
    ],
)
def test_benchmarks(
    name: str, file: str, figure: str | None, recipe: list[str], finished_run: Path, images: Path, tmp_path: Path
) -> None:
    options = write_benchmark(name, tmp_path, images)
    overlay = ["--config", str(ROOT / f"configs/evaluation/{name}.yaml")]
    assert main(["test", *recipe, *overlay, "--run_dir", str(finished_run), *options]) == 0
    value = json.loads((finished_run / f"test_{file}.json").read_text())
    assert (value["data"], value["paired"]["questions"], value["paired"]["images"]) == (
        file,
        6,
        6 if name == "science_qa" else 3,
    )
    for model in value["models"].values():
        assert model["questions"] == 6
        assert (figure is None) == (model["rule_figures"] == {})
        assert figure is None or figure in model["rule_figures"]
    assert f"6 questions of {file}" in (finished_run / f"test_{file}.md").read_text()


def test_figures_of_both_models(
    recipe: list[str], finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = EasyVQA().load("test")
    monkeypatch.setattr(EasyVQA, "rows", lambda self, split, start=0: iter(every[start:60]))
    assert main(["test", *recipe, "--run_dir", str(finished_run)]) == 0
    printed = capsys.readouterr().out
    value = json.loads((finished_run / "test.json").read_text())
    original, compressed = value["models"]["original"], value["models"]["compressed"]
    paired = value["paired"]
    assert paired["questions"] == original["questions"] == compressed["questions"] == 60
    assert paired["original"] == original["vqa_accuracy"]
    assert paired["compressed"] == compressed["vqa_accuracy"]
    assert paired["difference"] == pytest.approx(compressed["vqa_accuracy"] - original["vqa_accuracy"])
    assert original["model_bytes"] > compressed["model_bytes"] > 0
    assert (original["kl"], compressed["kl"] > 0) == (None, True)
    assert original["kl_interval"] is None
    intervals = {"kl": "kl", "perplexity": "perplexity", "flip_rate": "flip", "kl_answers": "kl_answers"}
    for figure, interval in intervals.items():
        low, high = compressed[f"{interval}_interval"]
        assert low <= compressed[figure] <= high
        assert low < high
    low, high = compressed["perplexity_interval"]
    assert f"{compressed['perplexity']:,.2f} ({low:,.2f} to {high:,.2f})" in (finished_run / "test.md").read_text()
    for model in (original, compressed):
        assert model["decoding"]["tokens_per_second"] > 0
        assert model["decoding"]["weights_bytes"] >= model["model_bytes"]
    for words in ("difference, points", "McNemar's exact p", "decode tokens/s", "peak memory", "flips %", "perplexity"):
        assert words in printed
        assert words in (finished_run / "test.md").read_text()


WARM_TEST = """
from casp_pl.checkpoint import load_compressed
from casp_pl.cli import main
from casp_pl.evaluation import measure_decoding
measure_decoding(load_compressed({folder!r})[0], tokens=2, repetitions=1)  # kernels are compiled, and count for both
raise SystemExit(main({command!r}))
"""


def test_peak_memory_is_that_of_one_model(tmp_path: Path) -> None:
    """205 MB of linears become 28; what the original left behind, or still holds, is not the compressed model's.

    The linears are small, because a pass dequantizes one of them at a time.
    """
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1408, num_hidden_layers=16, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    adapter, tokenizer = adapt(LlamaForCausalLM(config).requires_grad_(False)), load_tiny()[1].tokenizer
    tokenizer.save_pretrained(tmp_path / "original")
    adapter.model.save_pretrained(tmp_path / "original")
    with adapter.with_blocks(list(round_to_nearest(adapter, RTNQuantizer(), 4))) as model:
        save_compressed(model, tokenizer, tmp_path / "run/model", card="")
    command = ["test", "--config", str(ROOT / "configs/llama_gptq.yaml"), "--model.source", str(tmp_path / "original")]
    command += ["--data.text_length", "64", "--data.samples", "16", "--evaluation.questions", "0"]
    command += ["--evaluation.text_tokens", "400", "--evaluation.window", "200", "--run_dir", str(tmp_path / "run")]
    # a process of its own: what other tests have left in this one's heap would be taken up by either model
    script = WARM_TEST.format(folder=str(tmp_path / "run/model"), command=command)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    models = json.loads((tmp_path / "run/test.json").read_text())["models"]
    original, compressed = (models[name]["decoding"] for name in ("original", "compressed"))
    saved = original["weights_bytes"] - compressed["weights_bytes"]
    assert saved > 160e6
    # the rest of what is saved goes into what a pass dequantizes and prepares
    assert 0 < original["peak_memory_bytes"] - compressed["peak_memory_bytes"] <= saved


@pytest.mark.slow
def test_two_processes_report_what_one_does(
    recipe: list[str], finished_run: Path, images: Path, tmp_path: Path
) -> None:
    options = write_benchmark("mme", tmp_path, images)
    arguments = ["test", *recipe, "--config", str(ROOT / "configs/evaluation/mme.yaml"), *options]
    arguments += ["--run_dir", str(finished_run), "--evaluation.images_per_batch", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}  # two threads would round otherwise
    command = [sys.executable, "-m", "casp_pl", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    alone = json.loads((finished_run / "test_MME.json").read_text())
    command += ["--trainer.devices", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("McNemar's exact p") == 1
    together = json.loads((finished_run / "test_MME.json").read_text())
    assert together["paired"] == alone["paired"]
    for name, model in alone["models"].items():
        assert together["models"][name]["rule_figures"] == model["rule_figures"]
        for figure in ("vqa_accuracy", "vqa_interval", "flip_rate"):
            assert together["models"][name][figure] == model[figure]
        if model["kl_answers"] is not None:
            assert together["models"][name]["kl_answers"] == pytest.approx(model["kl_answers"], rel=1e-5)
