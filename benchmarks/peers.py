"""What other tools make of the same model: 2 bits, group size 64, the calibration and held-out text of `whole_model`.

usage: python -m benchmarks.peers gptqmodel
       python -m benchmarks.peers auto-round
       python -m benchmarks.peers hqq

`make peers` installs them in `.venv-peers`: run them with its Python, and with its `bin` first in PATH. A line counts 2
bits of codes, a float16 scale and a zero point of 2 bits (hqq: of 16) a group; embeddings stay as they are.
llama.cpp's types of 2 bits need rows of whole 256 weights, and SmolLM2's have 576: only its speed is compared, by
`benchmarks/llama_cpp.py`.
"""

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.clock import timed
from benchmarks.output import stdout_as_stderr
from casp_pl.data.calibration import CalibrationData
from casp_pl.data.evaluation import EvaluationData
from casp_pl.evaluation.figures import StageFigures
from casp_pl.evaluation.reference import ReferenceOutputs
from casp_pl.models.adapter import adapt
from casp_pl.models.demo.language import load_language_model, load_tokenizer
from casp_pl.modules.evaluation import EvaluationModule

GROUP = 64
BITS = 2


def gptqmodel(windows: list[Tensor]) -> Any:
    """GPTQ with act-order, asymmetric, as gptqmodel does it, loaded again by transformers."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with two cores its default is 1, which it refuses
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoModelForCausalLM

    config = QuantizeConfig(bits=BITS, group_size=GROUP, desc_act=True, sym=False, device="cpu")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # it writes logs where it stands
        source, target = Path(folder) / "source", Path(folder) / "target"
        load_language_model().save_pretrained(source)
        load_tokenizer().save_pretrained(source)
        model = GPTQModel.load(str(source), config)
        model.quantize([{"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)} for ids in windows], batch_size=8)
        model.save(str(target))
        return AutoModelForCausalLM.from_pretrained(target, device_map="cpu", dtype=torch.float32)


def auto_round(windows: list[Tensor]) -> Any:
    """AutoRound, asymmetric, 40 iterations a block; its own dequantized weights."""
    from auto_round import AutoRound

    model, length = load_language_model(), windows[0].shape[-1]
    tool = AutoRound(
        model, load_tokenizer(), scheme=f"W{BITS}A16", group_size=GROUP, sym=False, iters=40, dataset=windows,
        nsamples=len(windows), seqlen=length, batch_size=8, device_map="cpu", enable_torch_compile=False,
    )  # fmt: skip
    return tool.quantize()[0]


def hqq(_: list[Tensor]) -> Any:
    """Half-quadratic quantization, which sees no data; its own dequantized weights."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model, config = load_language_model(), BaseQuantizeConfig(nbits=BITS, group_size=GROUP)
    adapter = adapt(model)
    for block, name in product(adapter.blocks, adapter.linear_names):
        linear = block.get_submodule(name)
        quantized = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
        linear.weight.data = quantized.dequantize()
    return model


class Peer(NamedTuple):
    """What a tool makes of the calibration windows, and the bits of its zero points."""

    run: Callable[[list[Tensor]], Any]
    zero_bits: int = BITS


PEERS = {"gptqmodel": Peer(gptqmodel), "auto-round": Peer(auto_round), "hqq": Peer(hqq, zero_bits=16)}


def calibration_windows() -> list[Tensor]:
    """Token ids (1, 256) of the windows that `benchmarks.whole_model` calibrates on."""
    data = CalibrationData(samples=128, text_ratio=1.0, text_length=256, holdout=0.0, batch_size=1)
    data.attach(load_tokenizer())
    return [batch["input_ids"] for batch in data.calibration_dataloader()]


def evaluate(model: Any, reference: ReferenceOutputs | None = None) -> tuple[StageFigures, ReferenceOutputs]:
    """Figures on the held-out text, and the outputs that others are compared with."""
    data = EvaluationData(questions=0)
    data.attach(load_tokenizer())
    module = EvaluationModule(model.eval(), load_tokenizer(), reference=reference)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.test(module, datamodule=data, verbose=False)
    if module.figures is None or module.outputs is None:
        raise RuntimeError("the test run ended without figures")
    return module.figures, module.outputs


def main() -> None:
    """Print one line of a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    peer = parser.parse_args().peer
    with stdout_as_stderr():  # the tools log there
        original, outputs = evaluate(load_language_model())
        model, seconds = timed(lambda: PEERS[peer].run(calibration_windows()))
        figures, _ = evaluate(model, outputs)
    bits = BITS + (16 + PEERS[peer].zero_bits) / GROUP
    print(f"Original: perplexity {original.perplexity:.2f}\n")
    print("| tool | bits in all | perplexity | KL | CPU s |\n|---|---|---|---|---|")
    print(f"| {peer} | {bits:.3f} | {figures.perplexity:,.2f} | {figures.kl:.3f} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
