"""Decoders that are not of LLaMA's names: adapted by watching them, or refused in one sentence."""

from typing import Any

import pytest
import torch
import transformers

from casp_pl.errors import ConfigError
from casp_pl.models import adapt
from casp_pl.models.streams import first_block_batches, run_blocks

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _model(kind: str, name: str = "", **settings: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**(SIZES | settings))
    torch.manual_seed(0)
    model = getattr(transformers, name or f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("kind", "settings", "groups"),
    [
        ("Starcoder2", {"sliding_window": None}, [3, 1, 1, 1]),
        ("Glm", {"head_dim": 8, "pad_token_id": 0}, [3, 1, 1, 1]),
        ("Gemma", {"head_dim": 8}, [3, 1, 2, 1]),
        ("Olmo2", {}, [3, 1, 2, 1]),
    ],
)
def test_blocks_of_other_names(kind: str, settings: dict[str, Any], groups: list[int]) -> None:
    model = _model(kind, **settings)
    adapter = adapt(model)
    assert [len(group) for group in adapter.linear_groups] == groups
    linears = {name for name, module in adapter.blocks[1].named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(adapter.linear_names) == linears
    assert sorted(adapter.low_rank_names) == ["self_attn.k_proj", "self_attn.q_proj"]
    ids = torch.arange(14).view(2, 7) + 3
    (stream,) = first_block_batches(adapter, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    for block in adapter.blocks:
        (stream,) = run_blocks(block, [stream])
    actual, expected = adapter.head(adapter.decoder.norm(stream.hidden)), model(input_ids=ids).logits
    assert torch.equal(actual, expected), f"{(actual - expected).abs().max()}"


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("Phi3", {}, r"fused in one matrix \(self_attn\.qkv_proj\)"),
        ("Mixtral", {"num_local_experts": 2}, r"mixture of experts \(mlp\.experts\)"),
        ("Qwen3Moe", {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}, "mixture of experts"),
        ("OPT", {"ffn_dim": 40, "word_embed_proj_dim": 24}, "no rotary embeddings"),
        ("Gemma2", {"head_dim": 8}, r"changes its logits \(final_logit_softcapping = 30"),
        ("Cohere", {"logit_scale": 0.25}, r"changes its logits \(logit_scale = 0.25"),
        ("Phi", {}, "output head with a bias"),
        ("GPT2", {}, "no decoder blocks that casp_pl knows"),
    ],
)
def test_what_would_have_to_be_guessed_is_refused(kind: str, settings: dict[str, Any], words: str) -> None:
    model = _model(kind, "GPT2LMHeadModel" if kind == "GPT2" else "", **settings)
    with pytest.raises(ConfigError, match=words) as caught:
        adapt(model)
    assert len(str(caught.value).splitlines()) <= 3
    assert type(model).__name__ in str(caught.value)


def test_two_decoders_are_refused() -> None:
    model = _model(
        "Bart", "BartForConditionalGeneration", d_model=24, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=40,
        decoder_ffn_dim=40, encoder_attention_heads=3, decoder_attention_heads=3,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"several decoders \(model\.encoder, model\.decoder\)"):
        adapt(model)


def test_blocks_that_differ_are_refused() -> None:
    model = _model("Llama")
    model.model.layers[1].mlp.more = torch.nn.Linear(3, 3)
    with pytest.raises(ConfigError, match=r"Block 1 .* has linears that block 0 has not: mlp\.more"):
        adapt(model)


def test_a_weight_of_no_linear_is_refused() -> None:
    model = _model("Llama")
    model.model.layers[0].mlp.table = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ConfigError, match=r"Block 0 .* no linear layer's \(mlp\.table\)"):
        adapt(model)
