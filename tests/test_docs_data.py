"""Every example of docs/data.md runs: the code in an empty directory, then the recipe below it on the tiny model."""

import re
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from casp_pl.data import CalibrationData
from casp_pl.models.tiny import load_tiny

TEXT = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS = {
    title: re.findall(r"^```(\w+)\n(.*?)^```", body, flags=re.MULTILINE | re.DOTALL)
    for title, body in re.findall(r"^###? ([^\n]+)\n(.*?)(?=^##|\Z)", TEXT, flags=re.MULTILINE | re.DOTALL)
}
EXAMPLES = {title: dict(blocks) for title, blocks in SECTIONS.items() if blocks}


def test_there_is_an_example_of_every_source():
    recipes = "".join(blocks.get("yaml", "") for blocks in EXAMPLES.values())
    assert set(re.findall(r"casp_pl\.data\.(\w+)", recipes)) == {
        "HuggingFaceConversations",
        "HuggingFaceText",
        "LlavaJson",
        "Mixture",
        "TextFiles",
    }
    assert all(blocks["python"].count("\n") <= 13 for blocks in EXAMPLES.values())


@pytest.mark.parametrize("title", EXAMPLES)
def test_the_examples_run(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    exec(compile(EXAMPLES[title]["python"], title, "exec"), {"__name__": "example"})
    if "yaml" not in EXAMPLES[title]:
        return
    recipe = yaml.safe_load(EXAMPLES[title]["yaml"])
    parser = LightningArgumentParser()
    parser.add_class_arguments(CalibrationData, "data")
    data = parser.instantiate(parser.parse_object(recipe)).data
    data.attach(load_tiny()[1])
    counts = data.counts
    assert counts["samples"] + counts["held_back_samples"] == recipe["data"]["samples"]
    assert counts["skipped"] == []
