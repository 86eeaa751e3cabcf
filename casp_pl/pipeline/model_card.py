"""README.md of the model directory: what the model is, how good, how to load it, what it came from, its limits."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from casp_pl.callbacks.report import CompressionReport, StageRow
from casp_pl.callbacks.report_markdown import markdown_table, report_markdown
from casp_pl.callbacks.stage_table import HEADER, number, size, stage_cells
from casp_pl.data.sources import DataSource, EasyVQA, PydocProse
from casp_pl.models.demo import LANGUAGE_MODEL
from casp_pl.models.hub import hub_label
from casp_pl.pipeline.settings import RunSettings

__all__ = ["model_card"]

_MODELS = {
    "embedded": (
        "SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0) with the vision tower and projector of casp_pl (Apache-2.0)",
        "apache-2.0",
    ),
    "embedded-text": ("SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0)", "apache-2.0"),
    "tiny": ("random weights of casp_pl (Apache-2.0): for tests, it has learnt nothing", "apache-2.0"),
}
_BASES = {"embedded": LANGUAGE_MODEL, "embedded-text": LANGUAGE_MODEL, "tiny": None}
_DATA = {
    "EasyVQA": "easy-VQA (package easy-vqa 1.0, MIT)",
    "PydocProse": "the prose of Python's language reference (PSF-2.0)",
}
_LIMITS = """\
- Only the linear layers of the decoder blocks are compressed; everything else is stored in 16 or 32 bit.
- It was tuned to imitate the original, with its faults, on the data below. How it does elsewhere - other kinds of
  images, other languages, long answers - was not measured.
- The intervals cover the choice of test images, not the choice of seeds and calibration samples.
- A few tokens are multiplied without a dense weight, many (a prompt) by way of one that is rebuilt for a moment."""


def model_card(report: CompressionReport, settings: RunSettings, *, takes_images: bool) -> str:
    """The text: metadata that the hub reads, a summary, and the whole report behind it; no path of this machine.

    Args:
        report: of the run.
        settings: its recipe, for the model and the data by name.
        takes_images: whether the model does.
    """
    source = settings.model.source
    final, original = report.stages[-1], report.stage("original")
    hub_id = _hub_id(source)
    pinned = hub_label(hub_id, settings.model.revision) if source not in _MODELS and hub_id else None
    name = pinned or Path(source).name
    base, license = _MODELS.get(source, (f"`{name}`", "other"))
    auto_class = "AutoModelForImageTextToText" if takes_images else "AutoModelForCausalLM"
    parts = [
        _metadata(settings.quantizer.name, license, hub_id, takes_images=takes_images),
        f"# {report.name}",
        f"{base}, compressed by casp_pl with {report.quantizer} to {number(final.bits_per_weight_codes, 3)} bits a "
        f"weight ({number(final.bits_per_weight_total, 3)} with every codebook and scale), "
        f"{size(final.model_bytes)} in all.",
        "## How good\n\n" + markdown_table(HEADER, [stage_cells(row) for row in (original, final) if row is not None]),
        _in_words(final),
        "## How to load\n\nWith the package casp_pl installed:\n\n"
        "    import casp_pl\n"
        "    model, processor = casp_pl.load_compressed(DIR)\n\n"
        f"or, after `import casp_pl`, transformers' own `from_pretrained(DIR)` of `{auto_class}`. "
        "Weights are safetensors, no remote code is run.",
        "## Limits\n\n" + _LIMITS,
        "## Data\n\n" + "\n".join(_data(report, settings)),
        "## Licences\n\n" + _licences(settings, base),
        report_markdown(replace(report, model=name, command=report.command and _without_folders(report.command))),
    ]
    return "\n\n".join(parts)


def _metadata(quantizer: str, license: str, hub_id: str | None, *, takes_images: bool) -> str:
    """The YAML on top; its keys are huggingface.co/docs/hub/model-cards'."""
    values: dict[str, Any] = {"library_name": "transformers", "license": license}
    values["pipeline_tag"] = "image-text-to-text" if takes_images else "text-generation"
    if hub_id:
        values |= {"base_model": hub_id, "base_model_relation": "quantized"}
    values["tags"] = ["casp", "quantized", quantizer]
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _hub_id(source: str) -> str | None:
    """The name on the hub (org/name) of what `source` is or is made of; None for a directory outside the hub's cache.

    What a config or a card calls itself is not believed: it may be a folder of long ago, or the base of this base.
    """
    if source in _BASES:
        return _BASES[source]
    if not Path(source).is_dir():
        return source
    cached = (part for part in Path(source).resolve().parts if part.startswith("models--"))
    return next((part.removeprefix("models--").replace("--", "/") for part in cached), None)


def _without_folders(command: str) -> str:
    """Absolute paths cut to their last part."""
    return re.sub(r"(?<=[\s='])/\S*/", "", command)


def _in_words(row: StageRow) -> str:
    if row.vqa_accuracy is None:
        return f"Measured on {row.text_tokens or 0:,} tokens of held-out text."
    low, high = row.vqa_interval or (row.vqa_accuracy, row.vqa_accuracy)
    return (
        f"{100 * row.vqa_accuracy:.1f} % of {row.questions or 0:,} questions are answered right (95 % interval "
        f"{100 * low:.1f} to {100 * high:.1f}); perplexity and KL are those of {row.text_tokens or 0:,} tokens of text."
    )


def _data(report: CompressionReport, settings: RunSettings) -> Iterator[str]:
    counts = report.data.get("calibration", {})
    images, texts = counts.get("image_samples", 0), counts.get("text_samples", 0)
    if images:
        yield f"- calibration and tuning, images: {_source(settings.data.source, EasyVQA)}, {images:,} samples"
    if texts:
        yield f"- calibration and tuning, text: {_source(settings.data.text_source, PydocProse)}, {texts:,} samples"
    asked = report.data.get("evaluation", {}).get("questions", 0)
    if asked:
        yield f"- evaluation, held out: {_source(settings.evaluation.source, EasyVQA)}, {asked:,} questions"
    yield f"- evaluation, held out: {_source(settings.evaluation.text_source, PydocProse)} (text)"


def _source(source: DataSource | None, default: type[DataSource]) -> str:
    name = default.__name__ if source is None else type(source).__name__
    return _DATA.get(name, f"a source of the class {name} (licence: see its publisher)")


def _licences(settings: RunSettings, base: str) -> str:
    if settings.model.source in _MODELS:
        return f"Weights: {base}. Code that runs them: casp_pl, Apache-2.0."
    return (
        f"The weights are a derivative of {base} and stand under its licence; read it before you pass them on. "
        "Code that runs them: casp_pl, Apache-2.0."
    )
