"""The parts are found under the names that transformers gives them, and put back after they were exchanged."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from casp_pl.errors import ConfigError
from casp_pl.models import ModelAdapter, adapt


def _llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
            num_key_value_heads=1, head_dim=8,
        )
    ).eval()  # fmt: skip


def test_llava(adapter: ModelAdapter, model: Any) -> None:
    assert adapter.decoder is model.model.language_model
    assert adapter.decoder_name == "model.language_model"
    assert list(adapter.blocks) == list(model.model.language_model.layers)
    assert adapter.head is model.lm_head
    assert adapter.image_token_id == model.config.image_token_id


def test_text_model() -> None:
    model = _llama()
    adapter = adapt(model)
    assert adapter.decoder is model.model
    assert adapter.decoder_name == "model"
    assert len(adapter.blocks) == 3
    assert adapter.image_token_id is None
    assert not adapter.image_mask(torch.arange(6).view(2, 3)).any()
    assert adapter.shapes(2)["self_attn.k_proj"] == (8, 24)
    assert adapter.shapes(2)["mlp.down_proj"] == (24, 40)


def test_every_linear_of_a_block_is_covered(adapter: ModelAdapter) -> None:
    linears = {name for name, layer in adapter.blocks[1].named_modules() if isinstance(layer, nn.Linear)}
    assert set(adapter.linear_names) == linears
    assert len(adapter.linear_names) == len(linears)


def test_full_names_are_those_of_the_model(adapter: ModelAdapter, model: Any) -> None:
    for number, block in enumerate(adapter.blocks):
        for name in adapter.linear_names:
            assert model.get_submodule(adapter.full_name(number, name)) is block.get_submodule(name)


def test_groups_share_their_input_and_stand_in_order(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    seen: list[tuple[str, torch.Tensor]] = []
    for name in reversed(adapter.linear_names):
        linear = adapter.blocks[0].get_submodule(name)
        linear.register_forward_pre_hook(lambda _, inputs, name=name: seen.append((name, inputs[0])))
    adapter.model(input_ids=batches[1]["input_ids"])
    assert [name for name, _ in seen] == list(adapter.linear_names)
    inputs = dict(seen)
    for group in adapter.linear_groups:
        assert all(inputs[name] is inputs[group[0]] for name in group)
    assert len({id(inputs[group[0]]) for group in adapter.linear_groups}) == len(adapter.linear_groups)


def test_image_mask(adapter: ModelAdapter) -> None:
    ids = torch.tensor([[1, 258, 258], [258, 2, 3]])
    assert adapter.image_mask(ids).tolist() == [[False, True, True], [True, False, False]]


def test_with_blocks_runs_the_others_and_restores(adapter: ModelAdapter, model: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    own, before = adapter.blocks, model(input_ids=ids).logits
    others = [copy.deepcopy(block) for block in own]
    for block in others:  # both branches add nothing: such a block hands its input on
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    with adapter.with_blocks(others) as changed:
        assert changed is model
        assert list(adapter.blocks) == others
        expected = model.lm_head(adapter.decoder.norm(adapter.decoder.embed_tokens(ids)))
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert adapter.blocks is own
    assert torch.equal(model(input_ids=ids).logits, before)


def test_with_blocks_restores_after_an_error(adapter: ModelAdapter) -> None:
    own = adapter.blocks
    with pytest.raises(ZeroDivisionError), adapter.with_blocks(list(own)[:1]):
        raise ZeroDivisionError
    assert adapter.blocks is own


def test_model_without_decoder_is_refused() -> None:
    with pytest.raises(ConfigError, match="Sequential has no decoder blocks"):
        adapt(nn.Sequential(nn.Linear(2, 2)))


def test_block_without_a_linear_is_refused() -> None:
    model = _llama()
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(ConfigError, match=r"Block 1 of LlamaForCausalLM has no linear mlp\.up_proj"):
        adapt(model)
