"""Exports of a finished run, each loaded by the tool it is for in a process of its own, and compared with our model.

usage: python -m benchmarks.round_trips runs/NAME aqlm dense casp
       python -m benchmarks.round_trips runs/NAME gptq gptq_v2
       python -m benchmarks.round_trips runs/NAME gptq_v2 --loader gptqmodel

Compared are the logits of 1,024 held-out text tokens and, where the model sees images, of one question about one.
`gptq` and `gptq_v2` need the packages gptqmodel and optimum; gptqmodel itself reads `gptq` of its own making only.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from casp_pl.checkpoint import load_compressed
from casp_pl.data.images import load_image
from casp_pl.data.sources import EasyVQA, PydocProse
from casp_pl.data.tokenize import encode_windows, takes_images
from casp_pl.export import export_model

WINDOW = 256
LOADERS = {
    "transformers": """
        info = {}
        model, info = factory.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info""",
    "gptqmodel": """
        from gptqmodel import BACKEND, GPTQModel
        model = GPTQModel.load(directory, device="cpu", dtype=torch.float16, backend=BACKEND.TORCH)""",
}
READER = """
import sys
import torch, transformers
directory, inputs, logits, multimodal, own = sys.argv[1:]
if own == "True":
    import casp_pl
factory = transformers.AutoModelForImageTextToText if multimodal == "True" else transformers.AutoModelForCausalLM
if True:{loader}
assert own == "True" or not any(name.startswith("casp_pl") for name in sys.modules)
with torch.inference_mode():
    outputs = [model(**batch).logits.float() for batch in torch.load(inputs, weights_only=True)]
torch.save(outputs, logits)
"""


def make_inputs(processor: Any) -> list[dict[str, Tensor]]:
    """Keyword arguments of a forward pass, held-out text and a question about an image."""
    windows = list(encode_windows(PydocProse().load("test"), processor, length=WINDOW))[:4]
    inputs = [{"input_ids": torch.tensor([window.input_ids for window in windows])}]
    if takes_images(processor):
        sample = EasyVQA().load("test")[0]
        content = [{"type": "image"}, {"type": "text", "text": sample.turns[0].question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs.append(dict(processor(images=load_image(Path(str(sample.image))), text=prompt, return_tensors="pt")))
    return inputs


def read_elsewhere(directory: Path, inputs: list[dict[str, Tensor]], loader: str, *, images: bool) -> list[Tensor]:
    """Logits that another tool's process gets out of the exported directory."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(inputs, Path(folder) / "inputs.pt")
        arguments = [directory, f"{folder}/inputs.pt", f"{folder}/logits.pt", images, directory.name == "casp"]
        # aqlm's CPU kernel adds from several threads into one vector: right at one thread only
        environment = os.environ | {"NUMBA_NUM_THREADS": "1"}
        script = READER.format(loader=LOADERS[loader])
        command = [sys.executable, "-c", script, *map(str, arguments)]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        outputs: list[Tensor] = torch.load(f"{folder}/logits.pt", weights_only=True)
        return outputs


def main() -> None:
    """Print one line of a Markdown table per format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("formats", nargs="+")
    parser.add_argument("--loader", choices=LOADERS, default="transformers")
    options = parser.parse_args()
    model, processor = load_compressed(options.run / "model")
    inputs = make_inputs(processor)
    with torch.inference_mode():
        ours = [model(**batch).logits.float() for batch in inputs]
    print("| format | MB | largest logit | largest difference | KL | seconds in the other process |\n|" + "---|" * 6)
    for name in options.formats:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / name
            export_model(options.run / "model", directory, name)
            size = sum(file.stat().st_size for file in directory.iterdir()) / 1e6
            start = time.perf_counter()
            theirs = read_elsewhere(directory, inputs, options.loader, images=takes_images(processor))
            seconds = time.perf_counter() - start
        pairs = list(zip(ours, theirs, strict=True))
        largest = max(float(mine.abs().max()) for mine in ours)
        difference = max(float((mine - other).abs().max()) for mine, other in pairs)
        kl = max(float(divergence(mine, other)) for mine, other in pairs)
        print(f"| {name} | {size:.1f} | {largest:.1f} | {difference:.1e} | {kl:.1e} | {seconds:.0f} |", flush=True)


def divergence(mine: Tensor, theirs: Tensor) -> Tensor:
    """Mean KL divergence in nats per token."""
    p, q = mine.flatten(0, -2).log_softmax(-1), theirs.flatten(0, -2).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


if __name__ == "__main__":
    main()
