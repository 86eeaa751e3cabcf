"""GPTQ's layout: bit by bit as the format is described, and as gptqmodel and transformers with it read it."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast

from casp_pl.checkpoint import load_compressed, verify
from casp_pl.errors import ConfigError
from casp_pl.export import export_model
from casp_pl.export.gptq import to_gptq
from casp_pl.layers import UniformLinear
from casp_pl.models import load_model
from casp_pl.quantizers import GPTQQuantizer
from tests.export.made_models import IDS, compressed, logits_of_stock_transformers, make_llama, uniform

needs_gptqmodel = pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is None or importlib.util.find_spec("optimum") is None,
    reason="needs gptqmodel and optimum, and a torch that they take",
)


GROUP_SIZES = {"down_proj": 64, "layers.0.self_attn.v_proj": 16, "k_proj": 128}


def logits_of_gptqmodel(directory):
    """Logits of a fresh process with gptqmodel's own loader."""
    script = f"""
import torch
from gptqmodel import BACKEND, GPTQModel
torch.set_num_threads(1)
model = GPTQModel.load({str(directory)!r}, device="cpu", dtype=torch.float16, backend=BACKEND.TORCH)
with torch.no_grad():
    logits = model(input_ids=torch.tensor({IDS.tolist()})).logits.float()
torch.save(logits, {str(directory / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-P", "-c", script], check=True, timeout=300, cwd="/")
    return torch.load(directory / "logits.pt", weights_only=True)


def gptq_weight(tensors, bits, version):
    """Dequantized as the format is described, one bit at a time, in Python integers."""
    qweight, qzeros = (tensors[name].numpy().view("uint32").astype(object) for name in ("qweight", "qzeros"))
    columns, rows = len(tensors["g_idx"]), qweight.shape[1]
    weight = torch.empty(rows, columns)
    zeros = []
    for words in qzeros:
        stream = 0
        for place, word in enumerate(words):
            stream |= int(word) << (32 * place)
        if version == 1 and bits != 3:  # a one is added to every field, word by word
            ones = sum(1 << (bits * o) for o in range(rows))
            halves = [((stream >> 32 * p) + (ones >> 32 * p & 0xFFFFFFFF)) % 2**32 for p in range(len(words))]
            stream = sum(((half & 0xFFFFFFFF) << (32 * p)) for p, half in enumerate(halves))
        one = int(version == 1 and bits == 3)  # there it is added field by field
        zeros.append([((stream >> (bits * o)) + one) % 2**bits for o in range(rows)])
    for o in range(rows):
        stream = sum(int(word) << (32 * place) for place, word in enumerate(qweight[:, o]))
        for i in range(columns):
            group = int(tensors["g_idx"][i])
            code = (stream >> (bits * i)) % 2**bits
            weight[o, i] = float(tensors["scales"][group, o]) * (code - zeros[group][o])
    return weight


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("bits", "regrouped"), [(2, False), (3, False), (4, True), (8, False)])
def test_gptq_layout_bit_by_bit(bits: int, regrouped: bool, version: int, tmp_path: Path) -> None:
    source, _ = compressed(tmp_path, lambda linear, g, _: uniform(linear, g, bits=bits, regrouped=regrouped))
    export_model(source, tmp_path / "out", "gptq" if version == 1 else "gptq_v2")
    tensors = load_file(tmp_path / "out/model.safetensors")
    model, _ = load_compressed(source)
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        layer = model.model.layers[1].get_submodule(name)
        prefix = f"model.layers.1.{name}."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        torch.testing.assert_close(gptq_weight(own, bits, version), layer.dequantize().detach(), rtol=1e-6, atol=1e-7)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["desc_act"]) == (bits, 32, regrouped)


def test_gptq_names_the_modules_that_differ(tmp_path: Path) -> None:
    def mixed(linear, generator, number):
        return uniform(linear, generator, bits=4 if number == 1 and linear.out_features == 96 else 2)

    source, _ = compressed(tmp_path, mixed)
    with pytest.raises(ConfigError, match="one number of bits.*\n.*gptq_v2"):
        export_model(source, tmp_path / "out", "gptq")  # gptqmodel refuses it, transformers does not see `dynamic`
    export_model(source, tmp_path / "out", "gptq_v2")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["bits"] == 2
    pattern = re.compile("|".join(key.removeprefix("+:") for key in config["dynamic"]))
    names = [name for name, layer in make_llama().named_modules() if isinstance(layer, nn.Linear)]
    found = {name for name in names if pattern.match(name)}
    assert found == {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"}
    assert all(entry == {"bits": 4, "group_size": 32} for entry in config["dynamic"].values())


def with_group_sizes(folder, sizes):
    """`compressed` by GPTQ with 2 bits, in groups of 32 but for linears that are named."""
    quantizer = GPTQQuantizer(group_size=32, group_sizes=sizes)
    model = make_llama()
    names = {id(module): name for name, module in model.named_modules()}

    def quantized(linear, generator, number):
        moment = torch.diag(torch.rand(linear.in_features, generator=generator))
        own = quantizer.for_module(names[id(linear)])
        return own.quantize(linear.weight.detach(), moment, bits=2, bias=linear.bias)

    return compressed(folder, quantized, model)


def test_group_sizes_by_name_are_exported_bit_by_bit(tmp_path: Path) -> None:
    """Groups of 64 do not divide the 96 columns of down_proj, and those of 128 are whole rows; `verify` knows them."""
    source, _ = with_group_sizes(tmp_path, GROUP_SIZES)
    export_model(source, tmp_path / "out", "gptq_v2")
    assert verify(tmp_path / "out") == []
    tensors, (ours, _) = load_file(tmp_path / "out/model.safetensors"), load_compressed(source)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["group_size"] == 32
    found = {}
    for name in (name for name, layer in ours.named_modules() if isinstance(layer, UniformLinear)):
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        weight = ours.get_submodule(name).dequantize().detach()
        torch.testing.assert_close(gptq_weight(own, 2, 2), weight, rtol=1e-6, atol=1e-7)
        rules = [rule for key, rule in config["dynamic"].items() if re.match(key.removeprefix("+:"), name)]
        size = (rules[0] if rules else config)["group_size"]
        assert len(own["scales"]) == (1 if size == -1 else -(-weight.shape[1] // size))
        found |= {name.removeprefix("model.layers."): rule["group_size"] for rule in rules}
    whole_rows, wide = ({f"{block}.{name}" for block in range(2)} for name in ("self_attn.k_proj", "mlp.down_proj"))
    assert found == dict.fromkeys(whole_rows, -1) | dict.fromkeys(wide, 64) | {"0.self_attn.v_proj": 16}


def test_groups_that_no_reader_takes_are_refused(tmp_path: Path) -> None:
    source, _ = compressed(tmp_path, lambda linear, g, _: uniform(linear, g, group_size=8))
    with pytest.raises(ConfigError, match="groups of 8;.*\n.*dense"):
        export_model(source, tmp_path / "out", "gptq_v2")


def test_odd_widths_are_refused_by_gptq(tmp_path: Path) -> None:
    model = nn.Module()
    model.layer = uniform(nn.Linear(48, 31, bias=False), torch.Generator(), bits=3, group_size=16)
    with pytest.raises(ConfigError, match="31 x 48"):
        to_gptq(model, version=2)


def mixed_llava(folder):
    """The export of a tiny LLaVA with 4 bits in one kind of linear."""

    def mixed(linear, generator, number):
        other = number == 1 and linear.in_features > linear.out_features
        return uniform(linear, generator, bits=4 if other else 2, group_size=16)

    export_model(compressed(folder, mixed, *load_model("tiny"))[0], folder / "out", "gptq_v2")
    return folder / "out"


def test_gptq_names_the_modules_of_a_llava_as_its_files_and_as_transformers_do(tmp_path: Path) -> None:
    directory = mixed_llava(tmp_path)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    tensors = load_file(directory / "model.safetensors")
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    in_memory = {name: name.replace("language_model.model.", "model.language_model.") for name in names}
    used = set()
    for name in names:
        rules = [
            {key for key in config["dynamic"] if re.match(key.removeprefix("+:"), each)}
            for each in (name, in_memory[name])
        ]
        assert rules[0] == rules[1]
        used |= rules[0]
        settings = config["dynamic"][rules[0].pop()] if rules[0] else config
        columns, groups = len(tensors[f"{name}.g_idx"]), len(tensors[f"{name}.scales"])
        assert len(tensors[f"{name}.qweight"]) * 32 == columns * settings["bits"]
        assert groups * settings["group_size"] == columns
    assert all(name != other for name, other in in_memory.items())
    assert used == set(config["dynamic"]) != set()


@needs_gptqmodel
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_layout_in_transformers_with_gptqmodel(bits: int, layout: str, tmp_path: Path) -> None:
    source, expected = compressed(tmp_path, lambda linear, g, _: uniform(linear, g, bits=bits))
    export_model(source, tmp_path / "out", layout)
    torch.testing.assert_close(logits_of_stock_transformers(tmp_path / "out"), expected, rtol=0, atol=1e-3)


@needs_gptqmodel
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_columns_in_any_order_in_transformers_with_gptqmodel(layout: str, tmp_path: Path) -> None:
    """As the recipes quantize: the group of every column is stored (`g_idx`)."""
    source, expected = with_group_sizes(tmp_path, {})
    export_model(source, tmp_path / "out", layout)
    groups = load_file(tmp_path / "out/model.safetensors")["model.layers.0.mlp.down_proj.g_idx"]
    assert (groups.diff() < 0).any()
    torch.testing.assert_close(logits_of_stock_transformers(tmp_path / "out"), expected, rtol=0, atol=1e-3)


@needs_gptqmodel
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_llava_in_transformers_with_gptqmodel(layout: str, tmp_path: Path) -> None:
    model, processor = load_model("tiny")
    source, expected = compressed(tmp_path, lambda linear, g, _: uniform(linear, g, group_size=16), model, processor)
    export_model(source, tmp_path / "out", layout)
    logits = logits_of_stock_transformers(tmp_path / "out", multimodal=True)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)


@needs_gptqmodel
def test_mixed_bits_in_gptqmodel(tmp_path: Path) -> None:
    def mixed(linear, generator, number):
        return uniform(linear, generator, bits=4 if number == 1 and linear.out_features == 96 else 2)

    source, expected = compressed(tmp_path, mixed)
    assert_loaded_by_gptqmodel(source, expected, tmp_path / "out")


@needs_gptqmodel
def test_group_sizes_by_name_in_gptqmodel(tmp_path: Path) -> None:
    source, expected = with_group_sizes(tmp_path, GROUP_SIZES)
    assert_loaded_by_gptqmodel(source, expected, tmp_path / "out")


def assert_loaded_by_gptqmodel(source, expected, out):
    """Its loader takes version 1 with zero points from itself alone."""
    export_model(source, out, "gptq_v2")
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(out)  # it wants one
    logits = logits_of_gptqmodel(out)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.01)  # its torch kernel takes no float32
