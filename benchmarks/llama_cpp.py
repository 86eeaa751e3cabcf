"""One token through a decoder block of the shape of LLaVA-1.5-7B's: llama.cpp at 2 and 4 bits, and our layers.

usage: python -m benchmarks.llama_cpp [--hidden 4096] [--intermediate 11008] [--heads 32] [--threads 1 2] [--repeats 15]

`make llama-cpp` builds it into `.venv-peers`: run this with its Python. Contenders take turns; times are medians of a
whole step: a block, an embedding and a head of 256 tokens. llama.cpp gets the same random weights and in float32 has to
give the logits of transformers. Its smallest types need the importance of columns, which is 1 here, for only the time
counts; quality is not compared, since its types of 2 bits need rows of whole 256 weights and SmolLM2's have 576.
"""

import argparse
import ctypes
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks.clock import bandwidth, medians
from benchmarks.kernels import LAYERS

VOCABULARY = 256
CONTEXT = 64
TYPES = {
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q2_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K,
    "IQ2_XXS": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ2_XXS,
}
OURS = ("AQLM 2x8", "E8P", "GPTQ 2")
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip

Step = Callable[[], Tensor]


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """The model in float32, as llama.cpp reads it."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        block, _, inside = stem.removeprefix("model.layers.").partition(".")
        stored = ends.get(stem) or f"blk.{block}.{NAMES[inside]}"
        writer.add_tensor(f"{stored}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def importance(model: LlamaForCausalLM) -> Any:
    """That every column of every linear counts the same; the list ends with an entry without a name."""
    rows = [(f"blk.0.{NAMES[name]}.weight", layer.in_features) for name, layer in linears(model)]
    entries = (llama_cpp.llama_model_imatrix_data * (len(rows) + 1))()
    for entry, (name, width) in zip(entries, rows, strict=False):
        entry.name, entry.data, entry.size = name.encode(), (ctypes.c_float * width)(*[1.0] * width), width
    return entries


def linears(model: LlamaForCausalLM) -> list[tuple[str, nn.Linear]]:
    """Names inside the block, and layers."""
    return [(name, layer) for name, layer in model.model.layers[0].named_modules() if isinstance(layer, nn.Linear)]


def quantize(source: Path, target: Path, kind: int, columns: Any) -> int:
    """Every matrix in one type; returns bytes."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.pure, settings.imatrix, settings.nthread = kind, True, columns, 2
    settings.output_tensor_type = settings.token_embedding_type = int(gguf.GGMLQuantizationType.F32)
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp could not write {target}")
    return target.stat().st_size


@contextmanager
def opened(path: Path, threads: int) -> Iterator[Any]:
    """A context of llama.cpp on a file."""
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = CONTEXT, threads, threads
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    context = llama_cpp.llama_init_from_model(model, settings) if model else None
    if not context:
        raise RuntimeError(f"llama.cpp could not load {path}")
    try:
        yield context
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def logits_of(context: Any, token: int) -> Tensor:
    """Logits (V,) after one token at position 0."""
    memory = llama_cpp.llama_get_memory(context)
    llama_cpp.llama_memory_clear(memory, False)
    if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(token), 1)):
        raise RuntimeError("llama.cpp could not decode")
    return torch.tensor(llama_cpp.llama_get_logits(context)[:VOCABULARY])


def decoding(model: LlamaForCausalLM, token: int) -> Step:
    """One token at position 0 with a cache of keys and values, as llama.cpp has one."""
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
    ids, position = torch.tensor([[token]]), torch.tensor([0])
    return lambda: model(input_ids=ids, past_key_values=cache, cache_position=position).logits[0, -1]


def compressed(model: LlamaForCausalLM, name: str) -> tuple[LlamaForCausalLM, int]:
    """The same model with layers of ours in the block, of random codes; and their bytes."""
    other, size = LlamaForCausalLM(model.config).eval(), 0  # type: ignore[no-untyped-call]
    for place, linear in linears(other):
        layer = LAYERS[name](linear.out_features, linear.in_features)
        other.model.layers[0].set_submodule(place, layer)
        size += layer.nbytes
    return other, size


@torch.no_grad()
def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 4096), ("intermediate", 11008), ("heads", 32), ("repeats", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=options.hidden, intermediate_size=options.intermediate,
        num_hidden_layers=1, num_attention_heads=options.heads, num_key_value_heads=options.heads,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    ours = {name: compressed(model, name) for name in OURS}
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    with tempfile.TemporaryDirectory() as folder:
        files = {"float32": Path(folder) / "float32.gguf"}
        write_gguf(model, files["float32"])
        for name, kind in TYPES.items():
            files[name] = Path(folder) / f"{name}.gguf"
            quantize(files["float32"], files[name], kind, importance(model))
        table(model, ours, files, options.threads, options.repeats)


def table(model: Any, ours: Any, files: dict[str, Path], threads: list[int], repeats: int) -> None:
    """Print two lines for every number of threads: times, and what reading the weights takes at the least."""
    print("\nOne token through a block, ms (times faster than dense in float32 by torch)\n")
    sizes = {"dense, torch": files["float32"].stat().st_size} | {name: size for name, (_, size) in ours.items()}
    sizes |= {f"llama.cpp {name}": path.stat().st_size for name, path in files.items()}
    print(f"| threads | {' | '.join(sizes)} |\n|{'---|' * (len(sizes) + 1)}")
    for count in threads:
        torch.set_num_threads(count)
        with ExitStack() as stack:
            contexts = {name: stack.enter_context(opened(path, count)) for name, path in files.items()}
            check_same(contexts["float32"], model)
            steps: dict[str, Step] = {"dense, torch": decoding(model, 7)}
            steps |= {name: decoding(other, 7) for name, (other, _) in ours.items()}
            steps |= {f"llama.cpp {name}": partial(logits_of, context, 7) for name, context in contexts.items()}
            seconds = medians({name: [step] for name, step in steps.items()}, repeats)
        times = [f"{1e3 * seconds[name]:.2f} ({seconds['dense, torch'] / seconds[name]:.2f}x)" for name in sizes]
        print(f"| {count} | {' | '.join(times)} |")
        print(f"| limit | {' | '.join(f'{1e3 * size / bandwidth():.2f}' for size in sizes.values())} |", flush=True)


def check_same(context: Any, model: LlamaForCausalLM) -> None:
    """Fails where llama.cpp in float32 and transformers do not give the same logits."""
    difference = float((logits_of(context, 7) - decoding(model, 7)()).abs().max())
    if difference > 1e-3:
        raise RuntimeError(f"llama.cpp and transformers differ by {difference:.1e}: not the same model")


if __name__ == "__main__":
    main()
