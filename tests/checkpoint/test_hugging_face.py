import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import casp_pl
from casp_pl.checkpoint import load_compressed, module_specs, save_compressed, verify
from casp_pl.checkpoint.registration import CaspConfig, compact_state_dict, install_layers
from casp_pl.errors import ConfigError, InputError, IntegrityError, ResourceError
from casp_pl.layers.low_rank import LowRankLinear
from casp_pl.layers.uniform import UniformLinear
from casp_pl.models.tiny import load_tiny
from casp_pl.quantizers import AQLMQuantizer, RTNQuantizer

ROOT = Path(casp_pl.__file__).parents[1]


def quantized(weight, quantizer, bits, bias=None):
    layer = quantizer.quantize(weight.detach(), torch.eye(weight.shape[1]), bits=bits, bias=bias)
    layer.round_to_storage()
    return layer


def product(weight, rank):
    u, s, vt = torch.linalg.svd(weight.detach(), full_matrices=False)
    rtn = RTNQuantizer(group_size=16)
    return LowRankLinear(
        input_factor=quantized(s[:rank, None] * vt[:rank], rtn, 3), output_factor=quantized(u[:, :rank], rtn, 3)
    )


def compress(blocks):
    """q and k low-rank, the MLP uniform, one additive layer, one product with a dense factor; v and o stay."""
    for block in blocks:
        for name in ("q_proj", "k_proj"):
            setattr(block.self_attn, name, product(getattr(block.self_attn, name).weight, rank=8))
        for name, bits in (("gate_proj", 2), ("up_proj", 3), ("down_proj", 4)):
            layer = quantized(getattr(block.mlp, name).weight, RTNQuantizer(group_size=16), bits)
            setattr(block.mlp, name, layer)
    first, last = blocks[0], blocks[-1]
    first.self_attn.o_proj = quantized(first.self_attn.o_proj.weight, AQLMQuantizer(), 2)
    last.self_attn.v_proj = LowRankLinear(
        input_factor=nn.Linear(last.self_attn.v_proj.in_features, 4, bias=False),
        output_factor=nn.Linear(4, last.self_attn.v_proj.out_features, bias=False),
    )


def make_llava():
    model, processor = load_tiny()
    compress(model.model.language_model.layers)
    return model.eval(), processor


def make_llama(tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        attention_bias=True, tie_word_embeddings=tied, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    for block in model.model.layers:
        nn.init.normal_(block.self_attn.v_proj.bias)
        v_proj = block.self_attn.v_proj
        block.self_attn.v_proj = quantized(v_proj.weight, RTNQuantizer(), 2, bias=v_proj.bias.detach())
    return model.eval()


def inputs_of(model):
    if hasattr(model.config, "vision_config"):
        image = model.config.image_token_id
        tokens = torch.tensor([[1, *[image] * 16, 5, 6, 7], [2, 3, *[image] * 16, 8, 9]])
        generator = torch.Generator().manual_seed(0)
        return {"input_ids": tokens, "pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    return {"input_ids": torch.arange(20).view(2, 10)}


@torch.no_grad()
def logits(model):
    return model(**inputs_of(model)).logits


@pytest.fixture(scope="module")
def llava():
    return make_llava()


@pytest.fixture(scope="module")
def saved(llava, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "model"
    save_compressed(*llava, directory, card="# A card\n")
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_directory_is_complete_and_compact(llava, saved):
    names = {path.name for path in saved.iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "model.safetensors", "README.md", "manifest.json",
        "processor_config.json", "tokenizer.json", "chat_template.jinja",
    }  # fmt: skip
    assert (saved / "README.md").read_text() == "# A card\n"
    assert verify(saved) == []
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1
    config = json.loads((saved / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["quantization_config"]["quant_method"] == "casp"
    assert config["quantization_config"]["modules"] == module_specs(llava[0])
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert "language_model.lm_head.weight" not in kinds  # tied to the embeddings
    assert {kind for name, kind in kinds.items() if name.endswith("codes")} == {"U8"}
    assert {kind for name, kind in kinds.items() if name.endswith(("scales", "codebooks", "norm.weight"))} == {"F16"}


def test_bytes_on_disk_equal_the_reported_bits(llava, saved):
    reported = sum(module.nbytes for module in llava[0].modules() if isinstance(module, UniformLinear))
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    uniform = ("gate_proj", "up_proj", "down_proj", "input_factor", "output_factor")
    on_disk = sum(size for name, size in sizes.items() if name.split(".")[-2] in uniform and "weight" not in name)
    assert on_disk == reported


def test_reload_is_bit_equal(llava, saved):
    model, processor = load_compressed(saved)
    assert torch.equal(logits(model), logits(llava[0]))
    assert not model.training
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    for name, tensor in llava[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
        assert model.state_dict()[name].dtype == tensor.dtype, name
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    prompts = [side.apply_chat_template(messages, add_generation_prompt=True) for side in (processor, llava[1])]
    assert prompts[0] == prompts[1]
    assert model.generation_config.eos_token_id == llava[0].generation_config.eos_token_id


def test_saving_leaves_the_model_as_it_was(llava, saved):
    assert not hasattr(llava[0].config, "quantization_config")
    assert getattr(llava[0], "hf_quantizer", None) is None


def test_a_loaded_model_can_be_saved_again(llava, saved, tmp_path):
    model, processor = load_compressed(saved)
    save_compressed(model, processor, tmp_path / "ours", card="")
    model.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        again, _ = load_compressed(tmp_path / name)
        assert torch.equal(logits(again), logits(llava[0]))
        weights = tmp_path / name / "model.safetensors"
        assert weights.stat().st_size == (saved / "model.safetensors").stat().st_size


FRESH = """
import casp_pl, torch, transformers
model, info = transformers.AutoModelForImageTextToText.from_pretrained({saved!r}, output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
inputs = torch.load({given!r}, weights_only=True)
expected = inputs.pop("logits")
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, expected)
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
assert tokens.shape[1] > inputs["input_ids"].shape[1]
"""


@pytest.mark.slow
def test_fresh_process_gives_identical_logits_and_generates(llava, saved, tmp_path):
    given = tmp_path / "given.pt"
    torch.save({**inputs_of(llava[0]), "logits": logits(llava[0])}, given)
    code = FRESH.format(saved=str(saved), given=str(given))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tied", [False, True])
def test_text_model_round_trip(tmp_path, tied):
    from transformers import AutoModel, AutoModelForCausalLM

    model = make_llama(tied)
    save_compressed(model, None, tmp_path / "model", card="")
    again, processor = load_compressed(tmp_path / "model")
    assert processor is None
    assert torch.equal(logits(again), logits(model))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    without_head = AutoModel.from_pretrained(tmp_path / "model")
    assert isinstance(without_head.layers[0].self_attn.v_proj, UniformLinear)
    tokens = inputs_of(model)["input_ids"]
    with torch.no_grad():
        assert torch.equal(without_head(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


def test_llava_without_its_head_loads_too(llava, saved):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(saved)
    with torch.no_grad():
        states = model(**inputs_of(llava[0])).last_hidden_state
        assert torch.equal(states, llava[0].model(**inputs_of(llava[0])).last_hidden_state)


def test_half_precision_on_request(llava, saved):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(saved, dtype=torch.bfloat16)
    layer = model.model.language_model.layers[0].mlp.up_proj
    assert layer.scales.dtype == torch.bfloat16
    assert layer.codes.dtype == torch.uint8
    inputs = inputs_of(model)
    with torch.no_grad():
        half = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"].bfloat16()).logits.float()
    assert torch.nn.functional.cosine_similarity(half.flatten(), logits(llava[0]).flatten(), dim=0) > 0.99


def test_float32_that_float16_cannot_hold_stays(tmp_path):
    model = make_llama()
    exact = model.model.norm.weight
    inexact = model.model.layers[0].mlp.up_proj.weight
    state = compact_state_dict(model)
    assert state["model.norm.weight"].dtype == torch.float16
    assert state["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32
    with torch.no_grad():
        exact[0], exact[1] = -0.0, 1e30
        inexact.copy_(inexact.half())
    state = compact_state_dict(model)
    assert state["model.norm.weight"].dtype == torch.float32
    assert state["model.layers.0.mlp.up_proj.weight"].dtype == torch.float16


def test_the_target_is_absent_or_complete(llava, tmp_path, killed_in, monkeypatch):
    target = tmp_path / "model"
    killed_in(os, "rename", lambda: save_compressed(*llava, target, card="first"))
    assert not target.exists()
    assert len(list(tmp_path.iterdir())) == 1
    save_compressed(*llava, target, card="second")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    save_compressed(*llava, target, card="third")
    assert (target / "README.md").read_text() == "third"
    assert verify(target) == []

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(ResourceError, match="No space left"):
        save_compressed(*llava, target, card="fourth")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "README.md").read_text() == "third"


def test_other_directories_are_not_overwritten(llava, tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ResourceError, match="not overwritten"):
        save_compressed(*llava, tmp_path, card="")
    with pytest.raises(ResourceError, match="not overwritten"):
        save_compressed(*llava, tmp_path / "thesis.txt", card="")
    with pytest.raises(ResourceError, match="Cannot write"):
        save_compressed(*llava, tmp_path / "thesis.txt" / "model", card="")


def test_missing_or_foreign_models_are_an_input_error(tmp_path):
    with pytest.raises(InputError):
        load_compressed(tmp_path / "absent")
    with pytest.raises(InputError):
        load_compressed(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="none that casp_pl compressed"):
        load_compressed(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(IntegrityError):
        load_compressed(tmp_path)


def flip_a_bit(directory):
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def cut(directory):
    os.truncate(directory / "model.safetensors", 5000)


def pickle_beside(directory):
    (directory / "pytest_model.bin").write_bytes(b"\x80\x04.")


def index_outside(directory):
    (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def index_absolute(directory):
    index_outside(directory)
    path = directory / "model.safetensors.index.json"
    edit(path, lambda index: index["weight_map"].update({"lm_head.weight": "/etc/x.safetensors"}))


def no_weights(directory):
    (directory / "model.safetensors").unlink()


def change_config(change):
    def damage(directory):
        edit(directory / "config.json", lambda config: change(config["quantization_config"]))
        (directory / "manifest.json").unlink()

    return damage


UP = "model.language_model.layers.0.mlp.up_proj"
DAMAGES = {
    "bit": flip_a_bit,
    "cut": cut,
    "pickle": pickle_beside,
    "outside": index_outside,
    "absolute": index_absolute,
    "no weights": no_weights,
    "version": change_config(lambda config: config.update(version=2)),
    "key": change_config(lambda config: config.update(extra=1)),
    "kind": change_config(lambda config: config["modules"][UP].update(kind="magic")),
    "shape": change_config(lambda config: config["modules"][UP].update(out_features=10**15)),
    "bits": change_config(lambda config: config["modules"][UP].update(bits=8)),
    "group": change_config(lambda config: config["modules"][UP].update(group_size=0)),
    "name": change_config(lambda config: config["modules"].update({"model.nothing": config["modules"].pop(UP)})),
    "no linear": change_config(lambda config: config["modules"].update({"model": config["modules"].pop(UP)})),
    "left out": change_config(lambda config: config["modules"].pop(UP)),
    "list": change_config(lambda config: config.update(modules=[])),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_broken_model_is_an_integrity_error(copy, kind):
    DAMAGES[kind](copy)
    with pytest.raises(IntegrityError) as caught:
        load_compressed(copy)
    assert str(caught.value).count("\n") < 3
    assert verify(copy) != []


@pytest.mark.parametrize("damage", [index_outside, index_absolute])
def test_from_pretrained_refuses_weights_outside_as_well(copy, damage):
    from transformers import AutoModelForImageTextToText

    damage(copy)
    (copy.parent / "outside.safetensors").write_bytes(b"never read")
    with pytest.raises((IntegrityError, OSError)):
        AutoModelForImageTextToText.from_pretrained(copy)


def test_code_that_comes_along_is_ignored(copy, caplog):
    edit(copy / "config.json", lambda config: config.update(auto_map={"AutoConfig": "evil.Config"}))
    (copy / "evil.py").write_text("raise SystemExit('executed')")
    (copy / "manifest.json").unlink()
    load_compressed(copy)
    assert "auto_map" in caplog.text
    assert "manifest.json" in caplog.text


def test_plain_models_are_not_quantized_on_the_fly(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=CaspConfig(modules={}))


def test_install_layers_checks_shapes():
    model = make_llama()
    spec = {**UniformLinear(in_features=32, out_features=32, bits=2, group_size=16).spec(), "bias": True}
    install_layers(model, {"model.layers.0.self_attn.q_proj": spec})
    assert isinstance(model.model.layers[0].self_attn.q_proj, UniformLinear)
    with pytest.raises(IntegrityError, match="bias"):
        install_layers(model, {"model.layers.0.mlp.up_proj": spec})
    with pytest.raises((IntegrityError, ConfigError)):
        install_layers(model, {"model.layers.0.self_attn.q_proj": spec})
