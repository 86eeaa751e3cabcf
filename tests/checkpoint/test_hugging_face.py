import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import casp_pl
from casp_pl.checkpoint import load_compressed, save_compressed, verify
from casp_pl.checkpoint.registration import CaspConfig
from casp_pl.checkpoint.stored_names import compact_state_dict
from casp_pl.errors import ConfigError, IntegrityError, ResourceError
from casp_pl.layers.uniform import UniformLinear
from casp_pl.models.surgery import install_layers, layer_specs
from casp_pl.quantizers import RTNQuantizer

ROOT = Path(casp_pl.__file__).parents[1]


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
        block.self_attn.v_proj = RTNQuantizer().quantize(
            v_proj.weight, torch.eye(32), bits=2, bias=v_proj.bias.detach()
        )
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
    assert config["quantization_config"]["modules"] == layer_specs(llava[0])
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


def test_the_same_model_gives_the_same_bytes(llava, saved, tmp_path):
    save_compressed(deepcopy(llava[0]), llava[1], tmp_path / "again", card="# A card\n")
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (saved / "manifest.json").read_bytes()


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
    own = llava[0].model.language_model.layers[0].mlp.up_proj
    assert model.dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(), own.dequantize())  # tables are as exact as in the run
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

    rename = os.rename

    def full(source, destination):
        if (Path(source) / "README.md").read_text() == "fourth":
            raise OSError(28, "No space left on device")
        rename(source, destination)

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
