"""Every overlay of a real model, composed with its recipe, fits a tiny random checkpoint of its class.

Deep models and decoders without an overlay, too.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from PIL import Image

from casp_pl.checkpoint import load_compressed
from casp_pl.cli import main
from casp_pl.models.families import build_family
from casp_pl.models.surgery import compressed_layers

ROOT = Path(__file__).parents[2]
LINEARS = 7  # of a decoder block
CLASSES = {
    "llama_2_7b": "LlamaForCausalLM",
    "llama_3_8b": "LlamaForCausalLM",
    "llava_1_5_7b": "LlavaForConditionalGeneration",
    "llava_1_5_13b": "LlavaForConditionalGeneration",
    "llava_next_7b_vicuna": "LlavaNextForConditionalGeneration",
    "llava_next_7b_mistral": "LlavaNextForConditionalGeneration",
    "llava_next_13b": "LlavaNextForConditionalGeneration",
    "llava_next_video_7b": "LlavaNextVideoForConditionalGeneration",
    "llava_onevision_7b": "LlavaOnevisionForConditionalGeneration",
}
SMALL = """
data: {samples: 8, fine_tuning_samples: 8, text_length: 48, max_length: 1024, holdout: 0.25}
evaluation: {questions: 4, text_tokens: 128, window: 64}
low_rank: {keep_ratio: 0.5}
bits: {budget: 3.0}
baseline: null
block_tuning: {epochs: 1}
end_to_end: {steps: 1}
trainer: {accelerator: cpu}
"""


def write_checkpoint(overlay: str, folder: Path, blocks: int = 2) -> None:
    """A random model of the overlay's class; on LLaMA where the class is built on Mistral and the overlay is not."""
    model, processor = build_family(CLASSES[overlay])
    config: Any = model.config
    if overlay in ("llava_next_7b_vicuna", "llava_next_13b"):
        shared = {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"}
        config.text_config = transformers.LlamaConfig(**{name: getattr(config.text_config, name) for name in shared})
    text = config.get_text_config()
    text.num_hidden_layers = blocks
    if getattr(text, "layer_types", None):  # of one entry a block
        text.layer_types = text.layer_types[:1] * blocks
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = type(model)(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def small_recipe(overlay: str, folder: Path) -> list[str]:
    """Arguments: recipe, overlay, and what makes it small and local."""
    text_alone = overlay.startswith("llama")
    changes = yaml.safe_load(SMALL)
    changes["model"] = {"source": str(folder / "model")}
    if text_alone:
        (folder / "texts").mkdir()
        for split in ("train", "test"):
            rows = [
                json.dumps({"text": f"Sentence number {number} of the {split} split. " * 9}) for number in range(20)
            ]
            (folder / "texts" / f"{split}.jsonl").write_text("\n".join(rows))
        source = {"init_args": {"name": str(folder / "texts"), "config": None}}
        changes["data"]["text_source"] = changes["evaluation"]["text_source"] = source
    else:
        turns = [{"from": "human", "value": "<image>\nWhat colour is it?"}, {"from": "gpt", "value": "Red."}]
        for number in range(8):
            Image.new("RGB", (40, 20 + number), (250 - number, 0, 0)).save(folder / f"{number}.png")
        rows = [{"id": str(n), "image": f"{n}.png", "conversations": turns} for n in range(8)]
        (folder / "train.json").write_text(json.dumps(rows))
        paths = {"path": str(folder / "train.json"), "image_folder": str(folder)}
        changes["data"]["source"] = {"init_args": paths}
        changes["data"]["text_ratio"] = 0.25
    (folder / "small.yaml").write_text(yaml.safe_dump(changes))
    recipe = "llama_gptq" if text_alone else "llava_gptq"
    configs = [ROOT / f"configs/{recipe}.yaml", ROOT / f"configs/models/{overlay}.yaml", folder / "small.yaml"]
    return [part for path in configs for part in ("--config", str(path))] + ["--run_dir", str(folder / "run")]


def test_every_overlay_of_a_real_model_is_here_and_says_that_it_was_not_run() -> None:
    overlays = {path.stem: path.read_text() for path in (ROOT / "configs/models").glob("ll*.yaml")}
    assert overlays.keys() == CLASSES.keys()
    assert [name for name, text in overlays.items() if "Not run yet" not in text] == []


@pytest.mark.slow
@pytest.mark.parametrize("overlay", CLASSES)
def test_the_overlay_fits_a_model_of_its_class(overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_checkpoint(overlay, tmp_path / "model")
    assert main(["fit", *small_recipe(overlay, tmp_path)]) == 0
    model, _ = load_compressed(tmp_path / "run" / "model")
    assert type(model).__name__ == CLASSES[overlay]
    assert len(compressed_layers(model)) == 2 * LINEARS
    text = "mistral" if overlay.endswith("mistral") else "qwen2" if "onevision" in overlay else "llama"
    assert model.config.get_text_config().model_type == text
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["stages"][-1]["kl"] > 0
    assert (report["data"]["calibration"].get("image_samples", 0) > 0) == (not overlay.startswith("llama"))


@pytest.mark.slow
@pytest.mark.parametrize(("overlay", "blocks"), [("llava_1_5_13b", 40), ("llama_2_7b", 80)])
def test_deep_models(overlay: str, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_checkpoint(overlay, tmp_path / "model", blocks)
    arguments = small_recipe(overlay, tmp_path)
    assert main(["plan", "--quick", *arguments]) == 0
    assert main(["fit", *arguments]) == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert [module["block"] for module in plan["modules"]] == [n for n in range(blocks) for _ in range(LINEARS)]
    model, _ = load_compressed(tmp_path / "run" / "model")
    assert len(compressed_layers(model)) == blocks * LINEARS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "streaming"),
    [
        ("Starcoder2", {"sliding_window": 32}, "false"),
        ("Starcoder2", {"sliding_window": None}, "true"),
        ("Glm", {"head_dim": 16}, "false"),
        ("Gemma", {"head_dim": 16}, "true"),
        ("Olmo2", {}, "true"),
        ("Nemotron", {}, "false"),
        ("Arcee", {}, "true"),
    ],
)
def test_decoders_without_an_overlay(
    kind: str, settings: dict[str, Any], streaming: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    _, tokenizer = build_family("LlamaForCausalLM")
    sizes = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **sizes, **special, **settings)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = [*small_recipe("llama_2_7b", tmp_path), "--model.streaming", streaming]
    arguments += ["--model.dtype", "bfloat16" if streaming == "true" else "float32"]
    assert main(["plan", "--quick", *arguments]) == 0
    assert main(["fit", *arguments]) == 0
    assert main(["verify", str(tmp_path / "run")]) == 0
    model, _ = load_compressed(tmp_path / "run" / "model")
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears == {"lm_head"}, "every linear of a block is compressed"
