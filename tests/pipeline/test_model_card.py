"""The card says what the report measured, and loading as it says works."""

import json
from pathlib import Path

import yaml


def test_card_of_a_finished_run(finished_run: Path) -> None:
    text = (finished_run / "model" / "README.md").read_text()
    report = json.loads((finished_run / "report.json").read_text())
    _, metadata, body = text.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "library_name": "transformers", "license": "apache-2.0", "tags": ["casp", "quantized", "aqlm"]
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
