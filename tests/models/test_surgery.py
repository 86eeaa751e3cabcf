"""Compressed layers into a plain LLaMA block and back out of its tensors, biases included."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from casp_pl.errors import IntegrityError, NumericsError
from casp_pl.layers import LowRankLinear, QuantizedLinear
from casp_pl.models.surgery import (
    block_from_tensors,
    compressed_layers,
    install_layers,
    layer_specs,
    require_storable,
    round_to_storage,
)
from casp_pl.quantizers import AQLMQuantizer, RTNQuantizer
from casp_pl.quantizers.low_rank import quantize_low_rank

CPU = torch.device("cpu")


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Two blocks whose linears all have a bias."""
    config = LlamaConfig(
        vocab_size=37, hidden_size=24, intermediate_size=42, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=8, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _compress(block: nn.Module) -> nn.Module:
    """A copy with a low-rank W_q, an additive W_k and a uniform W_down; the rest stays dense."""
    block = copy.deepcopy(block)
    query, key, down = block.self_attn.q_proj, block.self_attn.k_proj, block.mlp.down_proj
    rtn, aqlm = RTNQuantizer(group_size=5), AQLMQuantizer(max_rounds=1, kmeans_iterations=2)
    block.self_attn.q_proj = quantize_low_rank(query.weight, torch.eye(24), 7, rtn, bits=3, bias=query.bias)
    block.self_attn.k_proj = aqlm.quantize(key.weight, torch.eye(24), bits=2, bias=key.bias)
    block.mlp.down_proj = rtn.quantize(down.weight, torch.eye(42), bits=2, bias=down.bias)
    return block.requires_grad_(False)


def _run(block: nn.Module, model: Any) -> torch.Tensor:
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    output = block(x, position_embeddings=model.model.rotary_emb(x, torch.arange(5)[None]))
    return output[0] if isinstance(output, tuple) else output


def test_compressed_layers_counts_a_low_rank_layer_once(model: LlamaForCausalLM) -> None:
    block = _compress(model.model.layers[0])
    found = compressed_layers(block)
    assert sorted(found) == ["mlp.down_proj", "self_attn.k_proj", "self_attn.q_proj"]
    assert isinstance(found["self_attn.q_proj"], LowRankLinear)
    assert compressed_layers(model.model.layers[0]) == {}


def test_block_from_tensors_round_trip(model: LlamaForCausalLM) -> None:
    original = model.model.layers[0]
    untouched = copy.deepcopy(original.state_dict())
    block = _compress(original)
    round_to_storage(block)
    specs = json.loads(json.dumps(layer_specs(block)))
    tensors = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    again = block_from_tensors(original, specs, tensors, CPU)
    assert layer_specs(again) == layer_specs(block)
    assert torch.equal(_run(again, model), _run(block, model))
    assert not torch.equal(_run(again, model), _run(original, model))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert not any(module.training for module in again.modules())
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, untouched[name]), f"{name} of the original was changed"


def test_bias_is_kept(model: LlamaForCausalLM) -> None:
    original = model.model.layers[0]
    block = _compress(original)
    again = block_from_tensors(original, layer_specs(block), block.state_dict(), CPU)
    for name, layer in compressed_layers(again).items():
        assert torch.equal(layer.bias, original.get_submodule(name).bias)
        x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(2))
        dense = nn.functional.linear(x, layer.dequantize(), original.get_submodule(name).bias)
        torch.testing.assert_close(layer(x), dense)


def test_missing_tensor_is_refused(model: LlamaForCausalLM) -> None:
    block = _compress(model.model.layers[0])
    tensors = dict(block.state_dict())
    del tensors["self_attn.k_proj.scales"]
    with pytest.raises(RuntimeError, match=r"self_attn\.k_proj\.scales"):
        block_from_tensors(model.model.layers[0], layer_specs(block), tensors, CPU)


def test_install_layers_takes_the_mode_of_the_linear_and_tables_are_float32(model: LlamaForCausalLM) -> None:
    specs = layer_specs(_compress(model.model.layers[0]))
    block = copy.deepcopy(model.model.layers[1]).to(torch.bfloat16).train()
    install_layers(block, specs)
    assert layer_specs(block) == specs
    layers = compressed_layers(block)
    assert all(layer.training for layer in layers.values())
    assert all(p.dtype == torch.float32 for layer in layers.values() for p in layer.parameters())
    assert isinstance(block.self_attn.v_proj, nn.Linear)


def test_names_of_the_whole_model_fit_the_model_without_its_head(model: LlamaForCausalLM) -> None:
    spec = layer_specs(_compress(model.model.layers[0]))["self_attn.k_proj"]
    for target, name in (
        (model, "model.layers.1.self_attn.k_proj"),
        (model.model, "model.layers.0.self_attn.k_proj"),
        (model, "layers.0.self_attn.k_proj"),
    ):
        install_layers(target, {name: spec})
        number = int(name.split("layers.")[1][0])
        assert isinstance(model.model.layers[number].self_attn.k_proj, QuantizedLinear)
        model.model.layers[number].self_attn.k_proj = nn.Linear(24, 8)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("self_attn.x_proj", r"has no module self_attn\.x_proj"),
        ("mlp", "mlp is a LlamaMLP in this model, not a linear"),
        ("mlp.up_proj", r"mlp\.up_proj is \(8, 24, True\) .* in this model \(42, 24, True\)"),
    ],
)
def test_what_does_not_fit_is_refused(model: LlamaForCausalLM, name: str, words: str) -> None:
    spec = layer_specs(_compress(model.model.layers[0]))["self_attn.k_proj"]
    with pytest.raises(IntegrityError, match=words):
        install_layers(model.model.layers[1], {name: spec})


def _tables(block: nn.Module) -> list[Tensor]:
    parts = (part for layer in compressed_layers(block).values() for part in layer.modules())
    return [table for part in parts if isinstance(part, QuantizedLinear) for table in part.tables().values()]


def test_what_float16_cannot_hold_is_told_and_nothing_is_rounded(model: LlamaForCausalLM) -> None:
    block = _compress(model.model.layers[0])
    tables = _tables(block)
    for table in tables:
        table.mul_(1 + 1e-4)
    before = [table.clone() for table in tables]
    require_storable(block)
    assert all(map(torch.equal, tables, before))
    tables[-1].view(-1)[0] = 1e6
    with pytest.raises(NumericsError, match="beyond float16"):
        require_storable(block)


def test_round_to_storage_leaves_numbers_of_float16(model: LlamaForCausalLM) -> None:
    block = _compress(model.model.layers[0])
    tables = _tables(block)
    for table in tables:
        table.mul_(1 + 1e-4)
    assert not all(torch.equal(table, table.half().float()) for table in tables)
    round_to_storage(block)
    assert len(tables) >= 4
    assert all(torch.equal(table, table.half().float()) for table in tables)
