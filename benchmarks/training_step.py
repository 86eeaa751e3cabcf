"""A step of end-to-end fine-tuning of the embedded LLaVA, compressed, against the same step of the dense model.

usage: python -m benchmarks.training_step [--repeats 5] [--threads 2]

The compressed models train codebooks, scales, vectors and norms, the dense one all weights of its decoder blocks or, as
a lower bound, the norms alone; all against the same teacher and on the same batches of six, made as
`configs/llava_aqlm.yaml` makes them, but of 48 samples where that has 400. With CASP W_q and W_k are products of half
as many weights. Contenders take turns; a step is loss, gradients and Adam. Peak memory is that of a process of its own
that takes three steps, the loading of the model included. What is of the steps is their own peak, counted from what
the process held before them.
"""

import argparse
import copy
import json
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.block_step import load_compiled
from benchmarks.clock import medians
from benchmarks.resident import peaks_of, printed_by
from casp_pl.data.calibration import CalibrationData
from casp_pl.models import adapt, load_model
from casp_pl.modules.end_to_end import EndToEndModule, teacher_states
from casp_pl.quantizers import AQLMQuantizer, GPTQQuantizer, Quantizer, QuIPSharpQuantizer, quantize_low_rank

QUICK = AQLMQuantizer(formats={2: [[2, 256, 8]]}, kmeans_iterations=1, max_rounds=1, feedback_beam=1, sweep_beam=1)
NORMS, CASP = "dense, norms alone", "AQLM 2x8, CASP"
QUANTIZERS: dict[str, Quantizer | None] = {
    "dense": None, NORMS: None, "AQLM 2x8": QUICK, CASP: QUICK, "QuIP# E8P": QuIPSharpQuantizer(),
    "GPTQ g64 act-order": GPTQQuantizer(group_size=64, order="activation"),
}  # fmt: skip
CHECKPOINTED = "AQLM 2x8, activation checkpointing"


def contender(name: str, samples: int = 48) -> Callable[[], float]:
    """One training step, which returns its loss. All blocks are the first one, compressed roughly: only work counts."""
    torch.manual_seed(0)
    model, processor = load_model()
    adapter = adapt(model)
    data = CalibrationData(samples=samples, questions_per_image=8, text_ratio=0.375, text_length=192, batch_size=6)
    data.attach(processor)
    batches = list(data.train_dataloader())
    teacher = teacher_states(adapter, batches)
    quantizer = QUANTIZERS["AQLM 2x8" if name == CHECKPOINTED else name]
    if quantizer is not None:
        block = copy.deepcopy(adapter.blocks[0])
        for linear in adapter.linear_names:
            weight = block.get_parameter(f"{linear}.weight")
            moment, is_low_rank = torch.eye(weight.shape[1]), name == CASP and linear in adapter.low_rank_names
            block.set_submodule(
                linear,
                quantize_low_rank(weight, moment, weight.numel() // (2 * sum(weight.shape)), quantizer, bits=2)
                if is_low_rank
                else quantizer.quantize(weight, moment, bits=2),
            )
        for number in range(len(adapter.blocks)):
            adapter.blocks[number] = copy.deepcopy(block)
    module = EndToEndModule(adapter, teacher, activation_checkpointing=name == CHECKPOINTED)
    if name == "dense":
        adapter.blocks.requires_grad_(True)
    optimizer: Any = module.configure_optimizers()["optimizer"]
    module.log = lambda *_, **__: None  # type: ignore[method-assign]  # there is no trainer
    turn = 0

    def step() -> float:
        nonlocal turn
        optimizer.zero_grad()
        loss = module.training_step(batches[turn % len(batches)], turn)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        turn += 1
        return loss.item()

    return step


def three(step: Callable[[], object]) -> None:
    """The first step makes Adam's tables, later ones run with them."""
    for _ in range(3):
        step()


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        if QUANTIZERS.get(options.memory_of, QUICK) is not None:
            load_compiled()
        steps = contender(options.memory_of)
        print(json.dumps(peaks_of(lambda: three(steps))))
        return
    names = [*QUANTIZERS, CHECKPOINTED]
    seconds = medians({name: [contender(name)] for name in names}, options.repeats)
    threads = ["--threads", str(options.threads)]
    peaks = {name: printed_by("benchmarks.training_step", "--memory-of", name, *threads) for name in names}
    step = f"step, s at threads: {options.threads}"
    print(f"| model | {step} | ratio | peak memory, GB | ratio | of the steps, GB | ratio |\n|" + "---|" * 7)
    for name in names:
        (peak, added), (dense_peak, dense_added) = peaks[name], peaks["dense"]
        print(
            f"| {name} | {seconds[name]:.2f} | {seconds[name] / seconds['dense']:.2f} | {peak / 1e9:.2f} |"
            f" {peak / dense_peak:.2f} | {added / 1e9:.2f} | {added / dense_added:.2f} |"
        )


if __name__ == "__main__":
    main()
