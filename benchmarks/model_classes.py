"""Every supported class, as a tiny random checkpoint on disk, through the command `fit` and back in a fresh process.

usage: python -m benchmarks.model_classes [--classes NAME ...] [--quantizers aqlm quip gptq] [--folder DIR]

parity: largest difference between transformers' logits and those of its blocks run one by one, as calibration and
tuning run them. reload difference: the same between the blocks that `fit` ended with, put into the original in this
process, and what `from_pretrained` makes of model/ in another. The classes that know videos learn from videos and
images, the others with images from easy-VQA, text models from text.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from casp_pl.checkpoint import read_safetensors
from casp_pl.data.collate import Collator
from casp_pl.data.selection import encode_conversations
from casp_pl.data.sources import DataSource, EasyVQA, LlavaJson, PydocProse
from casp_pl.data.tokenize import Encoded, encode_windows, takes_images
from casp_pl.models import ModelAdapter, adapt, load_model
from casp_pl.models.families import FAMILIES, write_family
from casp_pl.models.streams import first_block_batches, model_inputs, run_blocks
from casp_pl.models.surgery import block_from_tensors

WITH_VIDEO = ("LlavaNextVideoForConditionalGeneration", "LlavaOnevisionForConditionalGeneration")
ROWS = {"train": 60, "test": 12}
READER = """
import sys
import torch, transformers
import casp_pl
directory, inputs, outputs, factory = sys.argv[1:]
model, info = getattr(transformers, factory).from_pretrained(directory, output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
batch = torch.load(inputs, weights_only=True)
with torch.inference_mode():
    logits = model(**batch).logits
    length = int(batch["attention_mask"][0].sum())
    first = {key: batch[key][:1, :length] for key in ("input_ids", "attention_mask")}
    first |= {key: batch[key][:1] for key in ("pixel_values", "image_sizes") if key in batch}
    tokens = model.generate(**first, max_new_tokens=5, min_new_tokens=5, do_sample=False)
torch.save((logits, tokens[0, -5:]), outputs)
"""


def main() -> None:
    """Print one line of a Markdown table per class and quantizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--quantizers", nargs="+", choices=("aqlm", "quip", "gptq"), default=["aqlm", "quip", "gptq"])
    parser.add_argument("--folder", type=Path, help="keep the checkpoints and runs there")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    print("| class | parity | quantizer | seconds | reload difference | generated |\n|" + " --- |" * 6, flush=True)
    for name in options.classes:
        original = folder / name
        write_family(name, original / "original")
        write_videos(original / "videos") if name in WITH_VIDEO else None
        model, processor = load_model(str(original / "original"))
        adapter, batch = adapt(model), make_batch(name, original, processor)
        difference = parity(adapter, batch)
        for quantizer in options.quantizers:
            run = original / quantizer
            seconds = fit(name, original, quantizer, run)
            reload, tokens = compare(adapter, batch, run, images=takes_images(processor))
            generated = " ".join(map(str, tokens.tolist()))
            print(
                f"| {name} | {difference:.1e} | {quantizer} | {seconds:.0f} | {reload:.1e} | {generated} |", flush=True
            )
    if options.folder is None:
        shutil.rmtree(folder)


def source_of(name: str, original: Path) -> DataSource:
    """Where the samples of a class with images come from."""
    if name not in WITH_VIDEO:
        return EasyVQA()
    files = {split: original / "videos" / f"{split}.json" for split in ROWS}
    return LlavaJson(path=files["train"], test_path=files["test"], image_folder=original / "videos")


def make_batch(name: str, original: Path, processor: Any) -> dict[str, Tensor]:
    """Two conversations with pictures (or windows of text), padded, as a model takes them."""
    if takes_images(processor):
        samples = source_of(name, original).load("test")[:2]
        encoded = [one for sample in samples for one in encode_conversations([sample], processor, 4096)[0]]
    else:
        windows = list(encode_windows(PydocProse().load("test"), processor, length=64))[:2]
        encoded = [windows[0], Encoded("short", windows[1].input_ids[:40], windows[1].labels[:40])]
    return model_inputs(Collator(processor)(encoded))


@torch.inference_mode()
def parity(adapter: ModelAdapter, batch: dict[str, Tensor]) -> float:
    """Largest difference of logits, block by block against the whole model."""
    (stream,) = first_block_batches(adapter, [batch])
    for block in adapter.blocks:
        (stream,) = run_blocks(block, [stream])
    logits = adapter.head(adapter.decoder.norm(stream.hidden))
    return float((logits - adapter.model(**batch).logits).abs().max())


def fit(name: str, original: Path, quantizer: str, run: Path) -> float:
    """Seconds of the command."""
    recipe = f"configs/{'llava' if name.startswith('Llava') else 'llama'}_{quantizer}.yaml"
    command = [sys.executable, "-m", "casp_pl", "fit", "--config", recipe, "--config", "configs/models/tiny.yaml"]
    command += ["--model.source", str(original / "original"), "--run_dir", str(run)]
    if name in WITH_VIDEO:
        for part in ("data", "evaluation"):
            command += [f"--{part}.source", "casp_pl.data.sources.LlavaJson"]
            files = {"path": "train.json", "test_path": "test.json", "image_folder": ""}
            command += [f"--{part}.source.{key}={original / 'videos' / file}" for key, file in files.items()]
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(
            f"{name}, {quantizer}: code {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
        )
    return time.perf_counter() - start


@torch.inference_mode()
def compare(adapter: ModelAdapter, batch: dict[str, Tensor], run: Path, *, images: bool) -> tuple[float, Tensor]:
    """Largest difference of logits between the run's last blocks here and model/ elsewhere, and five new tokens."""
    blocks = []
    for number, original in enumerate(adapter.blocks):
        tensors, metadata = read_safetensors(run / "end_to_end" / f"{number:03d}.safetensors")
        blocks.append(block_from_tensors(original, json.loads(metadata["layers"]), tensors, torch.device("cpu")))
    with adapter.with_blocks(blocks) as model:
        ours = model(**batch).logits
    with tempfile.TemporaryDirectory() as folder:
        torch.save(batch, f"{folder}/batch.pt")
        factory = "AutoModelForImageTextToText" if images else "AutoModelForCausalLM"
        command = [sys.executable, "-c", READER, f"{run}/model", f"{folder}/batch.pt", f"{folder}/out.pt", factory]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        theirs, tokens = torch.load(f"{folder}/out.pt", weights_only=True)
    return float((ours - theirs).abs().max()), tokens


def write_videos(folder: Path) -> None:
    """Conversations, half about an image of easy-VQA, half about a video whose eleven frames are such images."""
    draw = random.Random(0)
    for split, count in ROWS.items():
        samples = EasyVQA().load(split)  # type: ignore[arg-type]
        rows = []
        for number in range(count):
            chosen = draw.sample(samples, 11)
            place = folder / split / f"{number:03d}"
            place.mkdir(parents=True)
            for frame, sample in enumerate(chosen if number % 2 else chosen[:1]):
                shutil.copy(str(sample.image), place / f"{frame:02d}.png")
            picture = {"video": f"{split}/{number:03d}"} if number % 2 else {"image": f"{split}/{number:03d}/00.png"}
            turn = chosen[0].turns[0]
            mark = "<video>" if number % 2 else "<image>"
            conversation = [
                {"from": "human", "value": f"{mark}\n{turn.question}"},
                {"from": "gpt", "value": turn.answer},
            ]
            rows.append({"id": f"{number:03d}", "conversations": conversation} | picture)
        (folder / f"{split}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
