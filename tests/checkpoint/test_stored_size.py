"""Sizes that are told beforehand against files that were written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from casp_pl.checkpoint import save_compressed
from casp_pl.checkpoint.atomic import write_safetensors
from casp_pl.checkpoint.stored_names import DTYPE_NAMES, compact_state_dict, half_of
from casp_pl.checkpoint.stored_size import StoredTensor, model_size, run_file_bytes, safetensors_bytes
from casp_pl.models import adapt, load_model
from casp_pl.models.load import ModelSource
from casp_pl.models.skeleton import load_skeleton
from casp_pl.models.surgery import install_layers
from casp_pl.quantizers import AQLMQuantizer, GPTQQuantizer, QuIPSharpQuantizer, RTNQuantizer
from casp_pl.quantizers.low_rank import low_rank_spec, quantize_low_rank

QUANTIZERS = {
    "rtn": RTNQuantizer(group_size=10),
    "gptq": GPTQQuantizer(group_size=12, order="activation"),
    "aqlm": AQLMQuantizer(max_rounds=1, kmeans_iterations=1, feedback_beam=1, sweep_beam=1),
    "quip": QuIPSharpQuantizer(),
}


def odd_llama(dtype=torch.float16):
    """A LLaMA of widths that no group length divides, with biases, values of `dtype` held in float32."""
    config = LlamaConfig(
        vocab_size=61, hidden_size=44, intermediate_size=86, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=22, attention_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        values = torch.ones_like(parameter) if "norm" in name else torch.randn_like(parameter)
        parameter.data = (values + 1e-5 * (dtype is torch.float32)).to(dtype).float()
    return model


def files(directory):
    return {path.name: path.stat().st_size for path in directory.iterdir()}


def compressed(model, quantizer, bits):
    """Every linear of the model quantized in place, W_q and W_k as low-rank products; the specs told beforehand."""
    specs = {}
    for number, block in enumerate(adapt(model).blocks):
        for name in adapt(model).linear_names:
            linear = block.get_submodule(name)
            (rows, columns), bias = linear.weight.shape, linear.bias is not None
            moment = torch.eye(columns)
            full = adapt(model).full_name(number, name)
            if name.endswith(("q_proj", "k_proj")):
                layer = quantize_low_rank(linear.weight, moment, 8 + number, quantizer, bits=bits, bias=linear.bias)
                specs[full] = low_rank_spec(rows, columns, 8 + number, quantizer, bits=bits, bias=bias)
            else:
                layer = quantizer.quantize(linear.weight, moment, bits=bits, bias=linear.bias)
                specs[full] = quantizer.layer_spec(rows, columns, bits=bits, bias=bias)
            assert specs[full] == layer.spec()
            block.set_submodule(name, layer)
    return specs


@pytest.mark.parametrize(("method", "bits"), [("rtn", 3), ("gptq", 2), ("aqlm", 2), ("aqlm", 3), ("quip", 2),
                                              ("quip", 3), ("quip", 4)])  # fmt: skip
def test_model_directory_to_the_byte(method, bits, tmp_path):
    model = odd_llama()
    with torch.device("meta"):
        outline = LlamaForCausalLM(model.config)
    specs = compressed(model, QUANTIZERS[method], bits)
    install_layers(outline, specs)
    size = model_size(outline, None, None)
    save_compressed(model, None, tmp_path / "model", card="a card")
    written = files(tmp_path / "model")
    assert size.weights == written["model.safetensors"]
    assert size.beside == written["config.json"] + written["generation_config.json"]
    assert size.undecided == 0


def test_names_on_disk_ties_and_trained_norms_are_counted(tmp_path):
    """The tiny LLaVA: other names in the file than in memory, embeddings tied to the head, a processor beside it."""
    model, processor = load_model("tiny")
    specs = compressed(model, QUANTIZERS["rtn"], 2)
    skeleton = load_skeleton(ModelSource(source="tiny"))
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    install_layers(skeleton.model, specs)
    trained = "model.language_model.layers.1.input_layernorm.weight"
    adapt(model).blocks[1].input_layernorm.weight.data += 1e-5  # no number of float16 any more
    size = model_size(skeleton.model, skeleton.processor, skeleton.headers, trained={trained})
    save_compressed(model, processor, tmp_path / "model", card="a card")
    written = files(tmp_path / "model")
    assert size.weights == written.pop("model.safetensors")
    assert size.beside == sum(count for name, count in written.items() if name not in ("README.md", "manifest.json"))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_headers_decide_what_is_stored_in_half(stored, tmp_path):
    model = odd_llama(stored)
    source = tmp_path / "source"
    model.to(stored).save_pretrained(source)
    _byte_tokenizer().save_pretrained(source)
    model.float()
    specs = compressed(model, QUANTIZERS["rtn"], 2)
    skeleton = load_skeleton(ModelSource(source=str(source)))
    install_layers(skeleton.model, specs)
    size = model_size(skeleton.model, None, skeleton.headers)
    save_compressed(model, None, tmp_path / "model", card="a card", half=half_of(skeleton.headers))
    written = tmp_path / "model" / "model.safetensors"
    assert (size.undecided == 0) == (stored is not torch.float32)
    assert not size.mixed
    assert written.stat().st_size == size.weights, "random values of float32 do not fit into 16 bits"
    kinds = {name: tensor.dtype for name, tensor in load_file(written).items() if tensor.dtype != torch.uint8}
    norms = {kind for name, kind in kinds.items() if name.endswith(("norm.weight", "bias", "embed_tokens.weight"))}
    assert norms == {stored}
    assert {kind for name, kind in kinds.items() if name.endswith("scales")} == {torch.float16}


def test_what_was_bfloat16_stays_so_where_float16_holds_it_too():
    model = odd_llama(torch.bfloat16)
    norm = model.model.norm.weight.fill_(1.0)
    for half in (torch.float16, torch.bfloat16):
        assert compact_state_dict(model, half)["model.norm.weight"].dtype is half
    norm.fill_(1 + 2**-10)
    assert compact_state_dict(model, torch.bfloat16)["model.norm.weight"].dtype is torch.float16


def _byte_tokenizer():
    return load_model("tiny")[1].tokenizer


def test_safetensors_header(tmp_path):
    tensors = {
        "b": torch.zeros(3, 1, dtype=torch.uint8),
        "a.weight": torch.zeros(7, 5, dtype=torch.float16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.zeros((), dtype=torch.int64),
        "caf\u00e9": torch.zeros(1001, dtype=torch.float32),
        **{f"of {kind}": torch.zeros(33).to(kind) for kind in DTYPE_NAMES},
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    stored = {name: StoredTensor(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert safetensors_bytes(stored, {"format": "pt"}) == (tmp_path / "x.safetensors").stat().st_size
    notes = {"layers": json.dumps({"a": [1, 2]}), "notes": "x"}
    write_safetensors(tmp_path / "y.safetensors", tensors, notes)
    assert run_file_bytes(tensors, notes) == (tmp_path / "y.safetensors").stat().st_size


@pytest.mark.parametrize("source", ["embedded", "embedded-text"])
def test_the_outline_of_an_embedded_model_is_configured_as_the_model_is(source):
    told, real = load_skeleton(ModelSource(source=source)).model.config, load_model(source)[0].config
    assert told.to_json_string() == real.to_json_string()
    assert "site-packages" not in real.to_json_string(), "where it was read stays out of what is saved"
