"""Small models with codes of every kind, saved, and what stock transformers computes of their exports."""

import os
import subprocess
import sys

import torch
from torch import nn

from casp_pl.checkpoint import load_compressed, save_compressed
from casp_pl.layers import AdditiveLinear, UniformLinear
from casp_pl.models import adapt

IDS = torch.tensor([[1, 5, 9, 33, 2, 17, 40]])


def make_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, dtype="float32",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def additive(linear, generator, *, entries=256):
    rows, columns = linear.weight.shape
    return AdditiveLinear.from_codes(
        torch.randint(0, entries, (rows, columns // 8, 2), generator=generator),
        0.1 * torch.randn(2, entries, 8, generator=generator),
        0.5 + torch.rand(rows, 1, generator=generator),
        in_features=columns,
        bias=linear.bias,
    )


def uniform(linear, generator, *, bits=2, group_size=32, regrouped=False):
    rows, columns = linear.weight.shape
    groups = columns // group_size
    order = torch.randperm(columns, generator=generator)
    return UniformLinear.from_codes(
        torch.randint(0, 2**bits, (rows, columns), generator=generator),
        torch.randint(0, 2**bits, (rows, groups), generator=generator),
        0.1 * (0.5 + torch.rand(rows, groups, generator=generator)) / 2**bits,
        bits=bits,
        group_size=group_size,
        column_groups=torch.empty_like(order).scatter_(0, order, torch.arange(columns) // group_size)
        if regrouped
        else None,
        bias=linear.bias,
    )


def compressed(folder, make_layer, model=None, processor=None):
    """A model with `make_layer` at every decoder linear, saved; its directory and logits."""
    model = make_llama() if model is None else model
    generator = torch.Generator().manual_seed(2)
    adapter = adapt(model)
    for number, block in enumerate(adapter.blocks):
        for name in adapter.linear_names:
            block.set_submodule(name, make_layer(block.get_submodule(name), generator, number))
        for layer in block.modules():
            if hasattr(layer, "round_to_storage"):
                layer.round_to_storage()
    save_compressed(model, processor, folder / "model", card="")
    with torch.no_grad():
        return folder / "model", load_compressed(folder / "model")[0](input_ids=IDS).logits


def logits_of_stock_transformers(directory, *, multimodal=False, dtype="float32"):
    """Logits of a fresh process that does not know casp_pl."""
    script = f"""
import sys, torch, transformers
torch.set_num_threads(1)
factory = transformers.{"AutoModelForImageTextToText" if multimodal else "AutoModelForCausalLM"}
model, info = factory.from_pretrained({str(directory)!r}, dtype=torch.{dtype}, output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert not any(name.startswith("casp_pl") for name in sys.modules)
with torch.no_grad():
    logits = model(input_ids=torch.tensor({IDS.tolist()})).logits.float()
torch.save(logits, {str(directory / "logits.pt")!r})
"""
    # aqlm's CPU kernel adds from several threads into one vector: right at one thread only
    environment = os.environ | {"NUMBA_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-P", "-c", script], check=True, timeout=300, cwd="/", env=environment)
    return torch.load(directory / "logits.pt", weights_only=True)
