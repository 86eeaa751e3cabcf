"""The card says what the report measured, tells the hub no lies and no paths, and loading as it says works."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from transformers.pipelines import SUPPORTED_TASKS

from casp_pl.callbacks.report import CompressionReport
from casp_pl.cli import main, recipe_parsers, settings_from
from casp_pl.models.families import write_family
from casp_pl.pipeline.model_card import model_card


def metadata(text: str) -> dict[str, Any]:
    """As huggingface_hub reads them, its rules kept."""
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] in SUPPORTED_TASKS
    assert {"casp", "quantized"} < set(data["tags"])
    assert ("base_model" in data) == ("base_model_relation" in data)
    validate_repo_id(data.get("base_model"))
    return data


def test_card_of_a_finished_run(finished_run: Path) -> None:
    text = (finished_run / "model" / "README.md").read_text()
    report = json.loads((finished_run / "report.json").read_text())
    _, head, body = text.split("---\n", 2)
    assert metadata(text) == yaml.safe_load(head) == {
        "library_name": "transformers", "license": "apache-2.0", "pipeline_tag": "image-text-to-text",
        "tags": ["casp", "quantized", "aqlm"],
    }  # fmt: skip
    final = report["stages"][-1]
    low, high = final["vqa_interval"]
    asked = f"{100 * final['vqa_accuracy']:.1f} % of {final['questions']} questions are answered right"
    assert f"{asked} (95 % interval {100 * low:.1f} to {100 * high:.1f})" in body
    assert f"{final['bits_per_weight_codes']:.3f} bits a weight" in body
    assert f"({final['bits_per_weight_total']:.3f} with every codebook and scale)" in body
    for heading in ("How good", "How to load", "Limits", "Data", "Licences"):
        assert f"\n## {heading}\n" in body
    counts = report["data"]["calibration"]
    assert f"easy-VQA (package easy-vqa 1.0, MIT), {counts['image_samples']} samples" in body


def test_the_card_loads_the_model(finished_run: Path) -> None:
    text = (finished_run / "model" / "README.md").read_text()
    lines = text.split("## How to load", 1)[1].split("## Limits", 1)[0].splitlines()
    code = "\n".join(line[4:] for line in lines if line.startswith("    "))
    names: dict[str, object] = {}
    exec(code.replace("DIR", repr(str(finished_run / "model"))), names)
    assert type(names["model"]).__name__ == "LlavaForConditionalGeneration"
    assert names["processor"] is not None


def card_of(source: str, finished_run: Path, *, takes_images: bool = True) -> str:
    parser = recipe_parsers()["fit"]
    settings = settings_from(parser, parser.parse_args(["--model.source", source]))
    report = CompressionReport.from_json(json.loads((finished_run / "report.json").read_text()) | {"model": source})
    return model_card(report, settings, takes_images=takes_images)


@pytest.mark.parametrize(
    ("source", "takes_images", "base"),
    [
        ("embedded", True, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("embedded-text", False, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("llava-hf/llava-1.5-7b-hf", True, "llava-hf/llava-1.5-7b-hf"),
    ],
)
def test_the_base_model_is_a_name_of_the_hub(source: str, takes_images: bool, base: str, finished_run: Path) -> None:
    text = card_of(source, finished_run, takes_images=takes_images)
    data = metadata(text)
    assert (data["base_model"], data["base_model_relation"]) == (base, "quantized")
    assert data["pipeline_tag"] == ("image-text-to-text" if takes_images else "text-generation")
    assert ("AutoModelForImageTextToText" in text) == takes_images


def test_a_copy_in_the_cache_of_the_hub_has_its_name(finished_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "models--some-org--some-model" / "snapshots" / "0123abc"
    copy.mkdir(parents=True)
    assert metadata(card_of(str(copy), finished_run))["base_model"] == "some-org/some-model"


def test_a_model_directory_names_no_path_of_this_machine(tmp_path: Path) -> None:
    write_family("LlamaForCausalLM", tmp_path / "my-llama")
    overlay = ["--model.source", str(tmp_path / "my-llama"), f"--run_dir={tmp_path / 'run'}"]
    tiny = ["--data.samples", "4", "--block_tuning.epochs", "0", "--end_to_end.steps", "0", "--baseline", "null"]
    root = Path(__file__).parents[2]
    recipe = ["--config", str(root / "configs/llama_gptq.yaml"), "--config", str(root / "configs/models/tiny.yaml")]
    assert main(["fit", *recipe, *overlay, *tiny]) == 0
    text = (tmp_path / "run/model/README.md").read_text()
    data = metadata(text)
    assert "base_model" not in data
    assert data["pipeline_tag"] == "text-generation"
    assert "AutoModelForCausalLM" in text
    assert "`my-llama`, compressed by casp_pl" in text
    assert "--run_dir=run" in text, "the command is there, without folders"
    for file in (tmp_path / "run/model").glob("*"):
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
