"""Calibration and compression of the first blocks of a LLaVA-1.5 shaped model that is never in memory as a whole.

usage: python -m benchmarks.large_model --shape 7b|13b|tiny [--blocks 2] [--quantizers aqlm quip gptq] [--out FOLDER]

A checkpoint of random bf16 weights in the shape of LLaVA-1.5 (CLIP-L/14 at 336 pixels, 576 image tokens) is written
once: all 32 blocks at 7b (13.5 GB), at 13b only the blocks that are used. Then `casp_pl fit` runs in a process of its
own for each quantizer, without evaluation and fine-tuning, on a view of the checkpoint with fewer blocks: what it holds
at once does not depend on their number. A shard or a row that is there already is not made again; a row that another
commit has finished names both commits. Memory is that of the process; "above" is what remains of it beside one block,
both second moments of its widest linear, and the inputs that are kept: the process itself, and what a quantizer makes
of the moments. "h all" is calibration and quantization of all blocks of the real model, at the pace of these.

`plan` is asked twice: before anything of the run exists for the memory (its answer is kept in RUN.forecast.json beside
the run, and printed again with it), and once the run has decided about ranks and bits for the bytes of the weights.
`tiny` is a model of some 200 thousand weights, to try the benchmark itself.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.output import stdout_as_stderr
from benchmarks.plan_accuracy import forecast, weights_on_disk
from casp_pl.callbacks.environment import source_commit
from casp_pl.callbacks.report_markdown import markdown_table

CONFIGS = Path(__file__).parents[1] / "configs"
SAMPLES, POSITIONS, PATCH = 16, 640, 14
GB = 1e9


class Vision(NamedTuple):
    """Of the vision tower, by default CLIP-L/14's at 336 pixels."""

    hidden: int = 1024
    intermediate: int = 4096
    layers: int = 24
    heads: int = 16
    projection: int = 768
    pixels: int = 336


class Shape(NamedTuple):
    """What differs between the models; `whole` if a checkpoint has all blocks, whatever is compressed of it."""

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    whole: bool
    vocabulary: int = 32064
    vision: Vision = Vision()


class Run(NamedTuple):
    """What a run took, beside what `plan` told.

    Attributes:
        report: its report.json.
        memory_told: bytes, before anything of the run existed.
        weights_told: bytes, with the ranks and bits that it chose.
        weights: bytes of its safetensors files.
        commit: that finished it; with the present one where an earlier run's row is printed again by another.
    """

    report: dict[str, Any]
    memory_told: int
    weights_told: int
    weights: int
    commit: str


SHAPES = {
    "7b": Shape(4096, 11008, 32, 32, whole=True),
    "13b": Shape(5120, 13824, 40, 40, whole=False),
    "tiny": Shape(64, 128, 3, 2, whole=True, vocabulary=320, vision=Vision(16, 32, 2, 2, 16, 28)),
}


def make_config(shape: Shape, vocabulary: Mapping[str, int], blocks: int) -> Any:
    """The config of LLaVA-1.5, for a byte tokenizer."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    end, tower = vocabulary["<|im_end|>"], shape.vision
    text = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=blocks, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=4096, rms_norm_eps=1e-5, bos_token_id=vocabulary["<|im_start|>"], eos_token_id=end,
        pad_token_id=end,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=tower.hidden, intermediate_size=tower.intermediate, num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads, image_size=tower.pixels, patch_size=PATCH, projection_dim=tower.projection,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=vocabulary["<image>"], vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=(tower.pixels // PATCH) ** 2, dtype="bfloat16",
    )  # fmt: skip


def write_checkpoint(folder: Path, shape: Shape, blocks: int) -> None:
    """The whole model or its first blocks: a shard for each block and one for the rest; finished shards stay."""
    from transformers import LlavaForConditionalGeneration
    from transformers.core_model_loading import revert_weight_conversion

    from casp_pl.models.tiny import make_processor

    folder.mkdir(parents=True, exist_ok=True)
    processor = make_processor(image_size=shape.vision.pixels, patch_size=PATCH)
    stored = shape.blocks if shape.whole else blocks
    config = make_config(shape, processor.tokenizer.get_vocab(), stored)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        number = name.split(".layers.")[1].split(".")[0] if "language_model.layers." in name else None
        groups.setdefault("rest" if number is None else f"block-{int(number):03d}", {})[name] = tensor
    places: dict[str, str] = {}
    for group, tensors in groups.items():
        file = folder / f"model-{group}.safetensors"
        on_disk = revert_weight_conversion(model, tensors)
        places |= dict.fromkeys(on_disk, file.name)
        if not file.exists():
            numbers = {name: _random(name, tensor) for name, tensor in on_disk.items()}
            save_file(numbers, folder / "unfinished", metadata={"format": "pt"})
            os.replace(folder / "unfinished", file)
            print(f"wrote {file}", file=sys.stderr, flush=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)


def _random(name: str, tensor: Tensor) -> Tensor:
    if name.endswith("bias"):
        return torch.zeros(tensor.shape, dtype=torch.bfloat16)
    if tensor.dim() == 1:
        return torch.ones(tensor.shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def view(checkpoint: Path, folder: Path, blocks: int) -> None:
    """A directory of the same files whose config has fewer blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in checkpoint.iterdir():
        if path.name != "config.json" and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = blocks
    (folder / "config.json").write_text(json.dumps(config))


def recipe_of(model: Path, quantizer: str) -> list[str]:
    """Arguments of `plan` and `fit` but for the run directory."""
    data = {"samples": SAMPLES, "fine_tuning_samples": SAMPLES, "holdout": 0, "text_ratio": 0}
    data |= {"questions_per_image": 2, "max_length": POSITIONS, "batch_size": 1}
    options = [part for key, value in data.items() for part in (f"--data.{key}", str(value))]
    off = ["--evaluation.questions", "0", "--evaluation.text_tokens", "0", "--baseline", "null"]
    off += ["--block_tuning.epochs", "0", "--end_to_end.steps", "0", "--override_memory"]
    config = ["--config", str(CONFIGS / f"llava_{quantizer}.yaml")]
    return [*config, "--model.source", str(model), "--model.streaming", "true", *options, *off]


def forecast_before(recipe: Sequence[str], folder: Path) -> dict[str, Any]:
    """What `plan` tells while nothing of the run exists, kept in a file beside it."""
    path = folder.with_name(f"{folder.name}.forecast.json")
    if not folder.exists() or not path.exists():
        told, _ = forecast([*recipe, "--quick"], folder.with_name(f"{folder.name}-not_yet"))
        path.write_text(json.dumps({"commit": source_commit(), **told}))
    kept: dict[str, Any] = json.loads(path.read_text())
    return kept


def fit(recipe: Sequence[str], folder: Path) -> Run:
    """A run in a process of its own, if it is not finished already, between two forecasts."""
    before = forecast_before(recipe, folder)
    finished = (folder / "model").exists()  # a report is written while stages run, too
    if not finished:
        with stdout_as_stderr():
            subprocess.run([sys.executable, "-m", "casp_pl", "fit", *recipe, "--run_dir", str(folder)], check=True)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    after, _ = forecast([*recipe, "--quick"], folder)
    if after["plan_from"] == "prediction":
        print(f"{folder}: plan only guesses its bits, its recipe was another one", file=sys.stderr)
    told = before["memory_bytes"], after["size"]["weights"]
    return Run(report, *told, weights_on_disk(folder), commit_of(report, folder, finished=finished))


def commit_of(report: Mapping[str, Any], folder: Path, *, finished: bool) -> str:
    """The commit of a row. That of an earlier run is only known to be the present one where no file was changed."""
    made, present = report["commit"], source_commit()
    if not finished or (made is not None and made == present and not made.endswith("-dirty")):
        return _short(made)
    print(f"{folder}: finished by commit {made}, not run again by {present}", file=sys.stderr)
    return f"{_short(made)}, not {_short(present)}"


def _short(commit: str | None) -> str:
    return "unknown" if commit is None else commit[:7] + ("-dirty" if commit.endswith("-dirty") else "")


def row(name: str, quantizer: str, run: Run, checkpoint: Path, shape: Shape) -> list[str]:
    """One line of the table."""
    report = run.report
    counts = report["data"]["calibration"]
    tokens = counts["image_tokens"] + counts["text_tokens"]
    widths = 6 * shape.hidden + shape.intermediate  # three streams of hidden states, and what four groups read
    known = 2 * (checkpoint / "model-block-000.safetensors").stat().st_size  # bf16 in files, float32 in memory
    known += 2 * 8 * shape.intermediate**2 + 4 * tokens * widths
    blocks = len({module["block"] for module in report["modules"]})
    seconds: dict[str, float] = {}
    for module in report["modules"]:
        kind = module["name"].rsplit(".", 1)[-1].removesuffix("_proj")
        seconds[kind] = seconds.get(kind, 0.0) + module["seconds"] / blocks
    calibration, quantization = (report["work_seconds"][stage] / blocks for stage in ("calibration", "quantize"))
    peak = report["peak_memory_bytes"]
    return [
        name,
        quantizer,
        str(blocks),
        str(tokens),
        f"{peak / GB:.2f}",
        f"{run.memory_told / GB:.2f}",
        f"{run.memory_told / peak:.2f}",
        f"{(peak - known) / GB:.2f}",
        ", ".join(f"{kind} {value:.0f}" for kind, value in seconds.items()),
        f"{calibration:.0f}",
        f"{quantization:.0f}",
        f"{(calibration + quantization) * shape.blocks / 3600:.1f}",
        f"{run.weights:,}",
        f"{run.weights_told:,}",
        f"{run.weights_told - run.weights:+,}",
        run.commit,
    ]


HEADINGS = [
    "model",
    "quantizer",
    "blocks",
    "tokens",
    "peak GB",
    "plan GB",
    "plan / peak",
    "above GB",
    "s a linear",
    "calibrate s a block",
    "quantize s a block",
    "h all",
    "weights on disk, bytes",
    "plan, bytes",
    "plan - disk, bytes",
    "commit",
]


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--blocks", type=int, default=None, help="blocks to compress; default 2 at 7b, 1 at 13b")
    parser.add_argument("--quantizers", nargs="+", default=["aqlm", "quip", "gptq"], choices=["aqlm", "quip", "gptq"])
    parser.add_argument("--out", type=Path, default=Path("runs/large_model"))
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    blocks = options.blocks or (2 if shape.whole else 1)
    checkpoint = options.out / options.shape
    write_checkpoint(checkpoint, shape, blocks)
    model = options.out / f"{options.shape}-{blocks}-blocks"
    view(checkpoint, model, blocks)
    rows = []
    for quantizer in options.quantizers:
        run = fit(recipe_of(model, quantizer), options.out / f"{options.shape}-{blocks}-{quantizer}")
        rows.append(row(options.shape, quantizer, run, checkpoint, shape))
    print(markdown_table(HEADINGS, rows))


if __name__ == "__main__":
    main()
