"""`plan` of models in files: what it says of a streamed run, and that it looks at no weight."""

import json
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from casp_pl.cli import main
from casp_pl.data import EvaluationData
from casp_pl.models import load_model
from casp_pl.models.tiny import load_tiny
from casp_pl.modules.evaluation import EvaluationModule
from casp_pl.pipeline.reading import measured_read_costs

CONFIGS = Path(__file__).parents[2] / "configs"


def told(recipe: list[str]) -> dict[str, Any]:
    with redirect_stdout(StringIO()) as printed:
        assert main(["plan", *recipe, "--json", "--quick"]) == 0
    value: dict[str, Any] = json.loads(printed.getvalue())
    return value


@pytest.mark.parametrize(
    ("dtype", "streaming"), [(torch.float16, "true"), (torch.bfloat16, "true"), (torch.bfloat16, "false")]
)
def test_a_run_of_a_model_in_files_is_foretold_to_the_byte(dtype: torch.dtype, streaming: str, tmp_path: Path) -> None:
    model, processor = load_tiny()
    # of float32 some happen to fit 16 bits; of bfloat16 the ones of norms would fit float16
    model.to(dtype).save_pretrained(tmp_path / "half", max_shard_size="60KB")
    processor.save_pretrained(tmp_path / "half")
    bare = ["--evaluation.questions", "0", "--evaluation.text_tokens", "0", "--baseline", "null",
            "--block_tuning.epochs", "0", "--end_to_end.steps", "0", "--data.samples", "8"]  # fmt: skip
    recipe = ["--config", str(CONFIGS / "llava_gptq.yaml"), "--config", str(CONFIGS / "models/tiny.yaml"), *bare]
    recipe += ["--model.source", str(tmp_path / "half"), "--model.streaming", streaming, "--activations", "disk"]
    recipe += ["--run_dir", str(tmp_path / "run")]
    assert main(["fit", *recipe]) == 0
    forecast = told(recipe)
    size = forecast["size"]
    written = {path.name: path.stat().st_size for path in (tmp_path / "run" / "model").iterdir()}
    weights = {name: count for name, count in written.items() if name.endswith(".safetensors")}
    assert size["files"] == len(weights) == (3 if streaming == "true" else 1)
    assert forecast["size_is_exact"]
    assert size["weights"] == sum(weights.values())
    others = {name: count for name, count in written.items() if name not in (*weights, "README.md", "manifest.json")}
    assert size["beside"] == sum(others.values())
    stages = {stage["name"]: stage for stage in forecast["stages"]}
    assert stages["quantize"]["disk_passing_bytes"] > 8 * 48 * 4, "activations on disk"


def test_a_model_for_a_gpu_that_is_not_here_is_streamed_only_where_the_recipe_says_so(
    stored_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of this machine, here next to nothing, is not that of the one with the GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100_000))
    recipe = ["--config", str(CONFIGS / "llava_gptq.yaml"), "--config", str(CONFIGS / "models/tiny.yaml")]
    recipe += ["--model.source", str(stored_tiny), "--run_dir", str(tmp_path / "none"), "--activations", "auto"]
    there = [*recipe, "--trainer.accelerator", "gpu"]
    here, whole, streamed = told(recipe), told(there), told([*there, "--model.streaming", "true"])
    assert [value["size"]["files"] for value in (here, whole, streamed)] == [3, 1, 3]
    assert "of the model's files read here" in here["seconds_from"]
    assert "files" not in streamed["seconds_from"]
    assert streamed["size"] == here["size"]
    passing = [{stage["name"]: stage["disk_passing_bytes"] for stage in value["stages"]} for value in (here, whole)]
    kept = {name: passing[0][name] - passing[1][name] for name in passing[0]}
    assert {name for name, count in kept.items() if count} >= {"calibration", "quantize"}, "activations on disk"


def _text_model(folder: Path) -> Path:
    config = LlamaConfig(
        vocab_size=512, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    load_model("tiny")[1].tokenizer.save_pretrained(folder)
    return folder


def _poisoned(source: Path, folder: Path) -> Path:
    """The same headers; every number NaN."""
    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        path.write_bytes(content[:start] + b"\xff" * (len(content) - start))
    return folder


@pytest.mark.parametrize("kind", ["image", "text"])
def test_no_weight_is_looked_at(kind: str, stored_tiny: Path, tmp_path: Path) -> None:
    sound = stored_tiny if kind == "image" else _text_model(tmp_path / "sound")
    name = "llava_gptq.yaml" if kind == "image" else "llama_gptq.yaml"
    recipe = ["--config", str(CONFIGS / name), "--config", str(CONFIGS / "models/tiny.yaml")]
    recipe += ["--run_dir", str(tmp_path / "none"), "--model.source"]
    of_sound, of_poisoned = (told([*recipe, str(path)]) for path in (sound, _poisoned(sound, tmp_path / "poisoned")))
    for key in ("plan", "size", "size_note", "original_bytes", "groups", "curve"):
        assert of_sound[key] == of_poisoned[key], key
    for stage, other in zip(of_sound["stages"], of_poisoned["stages"], strict=True):
        assert (stage["name"], stage["disk_bytes"]) == (other["name"], other["disk_bytes"])


def test_evaluation_is_counted_as_it_is_done() -> None:
    """Tokens and passes of the decoder, seen by a hook, beside what was counted before."""
    model, processor = load_tiny()
    data = EvaluationData(questions=12, text_tokens=130, window=32, images_per_batch=3, windows_per_batch=3)
    data.attach(processor)
    work = data.work
    seen: list[tuple[int, int]] = []
    decoder: Any = model.get_decoder()
    decoder.register_forward_pre_hook(
        lambda _, inputs, keywords: seen.append(tuple(keywords["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    module = EvaluationModule(model, processor)
    with torch.no_grad():
        module.on_test_start()
        for loader in data.test_dataloader():
            for batch in loader:
                module.test_step(batch, 0)
    answers = [rows for rows, length in seen if length == 1]
    assert work.tokens == sum(rows * length for rows, length in seen if length > 1)
    assert work.passes - work.answered == len(seen) - len(answers)
    most = (data.max_new_tokens - 1) * (work.passes - work.answered - 2) // 2
    assert 0 < work.answered <= most, "a random model goes on as long as it may, the expected answers are shorter"
    assert work.images == len({int(number) for batch in data.test_dataloader()[0] for number in batch["image_numbers"]})


def test_reading_is_timed_on_the_files(stored_tiny: Path, tmp_path: Path) -> None:
    costs = measured_read_costs(stored_tiny, torch.float32)
    assert costs is not None
    total = sum(path.stat().st_size for path in stored_tiny.glob("*.safetensors"))
    assert 0.8 * total < costs.measured <= total
    assert min(costs.first, costs.again) > 0
    assert measured_read_costs(tmp_path, torch.float32) is None
