"""Exports are read by the tools they are for, each in a fresh process without this package, and give our logits."""

import importlib.util
import json
import os
import re
import signal
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

from casp_pl.checkpoint import load_compressed, save_compressed, verify
from casp_pl.checkpoint.manifest import Manifest
from casp_pl.cli import main
from casp_pl.errors import ConfigError, NumericsError, ResourceError
from casp_pl.export import export_model
from casp_pl.export.gptq import to_gptq
from casp_pl.layers import AdditiveLinear, UniformLinear
from casp_pl.models import adapt, load_model
from casp_pl.quantizers import GPTQQuantizer

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


@pytest.mark.parametrize("entries", [256, 16])
def test_aqlm_layout_in_stock_transformers(entries: int, tmp_path: Path) -> None:
    source, expected = compressed(tmp_path, lambda linear, g, _: additive(linear, g, entries=entries))
    export_model(source, tmp_path / "out", "aqlm")
    torch.testing.assert_close(logits_of_stock_transformers(tmp_path / "out"), expected, rtol=0, atol=1e-4)


def test_aqlm_layout_of_a_llava_leaves_tower_and_head_alone(tmp_path: Path) -> None:
    model, processor = load_model("tiny")
    source, expected = compressed(tmp_path, lambda linear, g, _: additive(linear, g), model, processor)
    export_model(source, tmp_path / "out", "aqlm")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert set(config["linear_weights_not_to_quantize"]) == {
        "lm_head", "model.vision_tower", "model.multi_modal_projector"
    }  # fmt: skip
    logits = logits_of_stock_transformers(tmp_path / "out", multimodal=True)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


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


def test_group_sizes_by_name_are_exported_bit_by_bit(tmp_path: Path) -> None:
    """Groups of 64 do not divide the 96 columns of down_proj, and those of 128 are whole rows; `verify` knows them."""
    sizes = {"down_proj": 64, "layers.0.self_attn.v_proj": 16, "k_proj": 128}
    quantizer = GPTQQuantizer(group_size=32, group_sizes=sizes)
    model = make_llama()
    names = {id(module): name for name, module in model.named_modules()}

    def quantized(linear, generator, number):
        moment = torch.diag(torch.rand(linear.in_features, generator=generator))
        own = quantizer.for_module(names[id(linear)])
        return own.quantize(linear.weight.detach(), moment, bits=2, bias=linear.bias)

    source, _ = compressed(tmp_path, quantized, model)
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


def test_values_beyond_float16_are_not_exported_as_infinity(tmp_path: Path) -> None:
    model = make_llama()
    model.lm_head.weight.data[0, 0] = 1e5
    source, _ = compressed(tmp_path, lambda linear, g, _: uniform(linear, g), model)
    with pytest.raises(NumericsError, match="lm_head.*\n.*bfloat16"):
        export_model(source, tmp_path / "out", "dense", dtype="float16")
    export_model(source, tmp_path / "out", "dense", dtype="bfloat16")  # where nothing was left


@pytest.mark.parametrize("layout", ["dense", "casp"])
def test_a_model_is_never_overwritten_nor_is_the_source(layout: str, tmp_path: Path) -> None:
    source, _ = compressed(tmp_path / "one", lambda linear, g, _: uniform(linear, g))
    other, _ = compressed(tmp_path / "other", lambda linear, g, _: uniform(linear, g, bits=3))
    for out in (source, other):
        with pytest.raises(ResourceError, match="not overwritten"):
            export_model(source, out, layout)
        assert verify(out) == []
        assert load_compressed(out)[0].config.quantization_config is not None
    (tmp_path / "empty").mkdir()
    export_model(source, tmp_path / "empty", layout)
    assert verify(tmp_path / "empty") == []


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


needs_gptqmodel = pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is None or importlib.util.find_spec("optimum") is None,
    reason="needs gptqmodel and optimum, and a torch that they take",
)


@needs_gptqmodel
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_layout_in_transformers_with_gptqmodel(bits: int, layout: str, tmp_path: Path) -> None:
    source, expected = compressed(tmp_path, lambda linear, g, _: uniform(linear, g, bits=bits))
    export_model(source, tmp_path / "out", layout)
    torch.testing.assert_close(logits_of_stock_transformers(tmp_path / "out"), expected, rtol=0, atol=1e-3)


@needs_gptqmodel
def test_mixed_bits_in_gptqmodel(tmp_path: Path) -> None:
    def mixed(linear, generator, number):
        return uniform(linear, generator, bits=4 if number == 1 and linear.out_features == 96 else 2)

    source, expected = compressed(tmp_path, mixed)
    export_model(source, tmp_path / "out", "gptq_v2")  # its loader takes version 1 with zero points from itself alone
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path / "out")  # it wants one
    logits = logits_of_gptqmodel(tmp_path / "out")
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.01)  # its torch kernel takes no float32


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-5), ("float16", 0.02), ("bfloat16", 0.1)])
def test_dense_in_stock_transformers(dtype: str | None, tolerance: float, tmp_path: Path) -> None:
    source, expected = compressed(tmp_path, lambda linear, g, _: uniform(linear, g))
    export_model(source, tmp_path / "out", "dense", dtype=dtype)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    logits = logits_of_stock_transformers(tmp_path / "out")
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)


def test_own_layout_is_whole_and_equal(tmp_path: Path) -> None:
    source, expected = compressed(tmp_path, lambda linear, g, _: uniform(linear, g, bits=3))
    assert main(["export", str(source), "--format", "casp", "--out", str(tmp_path / "out")]) == 0
    assert verify(tmp_path / "out") == []
    with torch.no_grad():
        assert torch.equal(load_compressed(tmp_path / "out")[0](input_ids=IDS).logits, expected)


@pytest.mark.parametrize("layout", ["aqlm", "gptq", "gptq_v2"])
def test_low_rank_layers_are_refused_with_a_way_out(
    layout: str, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(finished_run), "--format", layout, "--out", str(tmp_path / "out")]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "low_rank" in message
    assert "dense" in message
    assert len(message.splitlines()) <= 3
    assert not (tmp_path / "out").exists()


def test_a_real_run_exports_as_dense(finished_run: Path, tmp_path: Path) -> None:
    assert main(["export", str(finished_run), "--format", "dense", "--out", str(tmp_path / "out")]) == 0
    with torch.no_grad():
        expected = load_compressed(finished_run / "model")[0](input_ids=IDS).logits
    logits = logits_of_stock_transformers(tmp_path / "out", multimodal=True)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_what_cannot_be_expressed_says_why(tmp_path: Path) -> None:
    source, _ = compressed(tmp_path, lambda linear, g, number: additive(linear, g, entries=256 if number else 16))
    with pytest.raises(ConfigError, match="one format for all layers"):
        export_model(source, tmp_path / "out", "aqlm")
    with pytest.raises(ConfigError, match="kind additive"):
        export_model(source, tmp_path / "out", "gptq")
    with pytest.raises(ConfigError, match="formats are"):
        export_model(source, tmp_path / "out", "gguf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious.txt").write_text("mine")
    with pytest.raises(ResourceError, match="not overwritten"):
        export_model(source, tmp_path / "out", "dense")
    assert (tmp_path / "out/precious.txt").read_text() == "mine"


def test_odd_widths_are_refused_by_gptq(tmp_path: Path) -> None:
    model = nn.Module()
    model.layer = uniform(nn.Linear(48, 31, bias=False), torch.Generator(), bits=3, group_size=16)
    with pytest.raises(ConfigError, match="31 x 48"):
        to_gptq(model, version=2)


@pytest.mark.parametrize("moment", ["fsync", "rename"])
def test_a_killed_export_leaves_no_directory(tmp_path, moment):
    source, _ = compressed(tmp_path, lambda linear, generator, _: uniform(linear, generator))
    out = tmp_path / "out" / "dense"
    out.parent.mkdir()
    command = ["export", str(source), "--format", "dense", "--out", str(out)]
    code = (
        f"import os, signal, sys; from casp_pl.cli import main; os.{moment} = lambda *_, **__: os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", f"{code}; main(sys.argv[1:])", *command], timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    (leftover,) = (tmp_path / "out").iterdir()
    assert leftover.name.startswith(".tmp")
    assert main(command) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dense"]
    assert Manifest.load(out).problems(out) == {}
