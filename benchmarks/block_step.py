"""A step of block tuning of one compressed block, in time and memory, against the same step of the dense block.

usage: python -m benchmarks.block_step [--shapes embedded 7b] [--repeats 5] [--threads 1]

A block is Llama's, with random weights or codes: only the work counts. `embedded` has the widths of SmolLM2-135M and
the tokens of a batch of a fit, `7b` those of LLaMA-7B and few tokens: there every weight is rebuilt backwards and none
is kept (`casp_pl.layers.product`). The compressed blocks train codebooks, scales, vectors and norms, the dense one all
weights or, as a lower bound, the norms alone. A step is `BlockwiseModule`'s loss, the gradients and Adam. Contenders
take turns, times are medians. Memory is that of a process of its own: of the block as it lies there with its inputs,
and what the peak of three steps adds to it.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from benchmarks.clock import medians
from benchmarks.kernels import additive, lattice, uniform
from benchmarks.resident import peaks_of, printed_by, resident_bytes
from casp_pl.models.streams import BlockBatch
from casp_pl.modules.blockwise import BlockwiseModule


class Shape(NamedTuple):
    """Widths of a block and tokens of a batch."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    samples: int
    length: int


SHAPES = {"embedded": Shape(576, 1536, 9, 3, 6, 192), "7b": Shape(4096, 11008, 32, 32, 1, 64)}
TINY = Shape(64, 128, 1, 1, 1, 4)
DENSE, NORMS = "dense", "dense, norms alone"
LAYERS: dict[str, Callable[[int, int], nn.Module] | None] = {
    DENSE: None, NORMS: None, "AQLM 2x8": additive(2), "QuIP# E8P": lattice(2), "GPTQ g64 act-order": uniform(2),
}  # fmt: skip


def make_block(name: str, config: LlamaConfig) -> Any:
    """A decoder block whose linears are those of a contender."""
    make = LAYERS[name]
    with torch.device("meta" if make is not None else "cpu"):  # dense weights would be peak memory of the compressed
        block = LlamaDecoderLayer(config, 0)
    if make is None:
        return block
    for place, module in list(block.named_modules()):
        if isinstance(module, nn.Linear):
            block.set_submodule(place, make(*module.weight.shape))
        elif "norm" in place:
            module.weight = nn.Parameter(torch.ones(config.hidden_size))
    return block


def config_of(shape: Shape) -> LlamaConfig:
    """Of a model with such blocks."""
    settings: dict[str, Any] = {"attn_implementation": "sdpa"}  # an argument that transformers does not declare
    return LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads, **settings,
    )  # fmt: skip


def step_of(name: str, block: Any, shape: Shape) -> Callable[[], None]:
    """One training step of a contender's block, always on the same batch."""
    hidden = torch.randn(shape.samples, shape.length, shape.hidden)
    rotary = LlamaRotaryEmbedding(config_of(shape))(hidden, torch.arange(shape.length)[None])
    real = torch.ones(hidden.shape[:2], dtype=torch.bool)
    batch = BlockBatch(hidden, real, ~real, {"position_embeddings": rotary, "attention_mask": None})
    target = torch.randn_like(hidden)
    module = BlockwiseModule([block], [(batch, target)], [])
    if name == DENSE:
        block.requires_grad_(True)
    optimizer: Any = module.configure_optimizers()["optimizer"]

    def step() -> None:
        optimizer.zero_grad()
        module.batch_loss((batch, target)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def contender(name: str, shape: Shape) -> Callable[[], None]:
    """One training step of a block of random weights."""
    torch.manual_seed(0)
    return step_of(name, make_block(name, config_of(shape)), shape)


def load_compiled() -> None:
    """What is compiled is memory too, but of no block: a step of a tiny block of every kind loads it."""
    for name in LAYERS:
        contender(name, TINY)()


def memory(name: str, shape: Shape) -> tuple[int, int]:
    """Bytes of the block with its inputs, and what three steps add."""
    load_compiled()
    before = resident_bytes()
    step = contender(name, shape)
    held = resident_bytes() - before
    return held, peaks_of(lambda: [step() for _ in range(3)])[1]


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", nargs=2, metavar=("SHAPE", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        shape, name = options.memory_of
        print(json.dumps(memory(name, SHAPES[shape])))
        return
    heads = [
        "block",
        f"step, ms at threads: {options.threads}",
        "ratio",
        "held, MB",
        "ratio",
        "of the steps, MB",
        "ratio",
    ]
    print(f"| {' | '.join(heads)} |\n|" + "---|" * len(heads))
    for shape in options.shapes:
        seconds = medians({name: [contender(name, SHAPES[shape])] for name in LAYERS}, options.repeats)
        threads = ["--threads", str(options.threads)]
        bytes_of = {name: printed_by("benchmarks.block_step", "--memory-of", shape, name, *threads) for name in LAYERS}
        for name in LAYERS:
            figures = [(1e3 * seconds[name], 1e3 * seconds[DENSE])]
            figures += [(1e-6 * own, 1e-6 * dense) for own, dense in zip(bytes_of[name], bytes_of[DENSE], strict=True)]
            cells = " | ".join(f"{own:.1f} | {own / dense:.2f}" for own, dense in figures)
            print(f"| {shape} {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
