"""Passes that begin inside a block give, to the last bit, what passes from its inputs give."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from casp_pl.allocation import ModulePlan
from casp_pl.layers import materialized
from casp_pl.models import ModelAdapter, adapt, compress
from casp_pl.models.compress import BlockQuantization
from casp_pl.models.families import FAMILIES, build_family
from casp_pl.models.streams import (
    BlockBatch,
    closing_linears_of,
    first_block_batches,
    linear_inputs,
    reach,
    run_block,
    run_blocks_seeing,
)
from casp_pl.quantizers import AQLMQuantizer, GPTQQuantizer, QuIPSharpQuantizer, RTNQuantizer

DECODERS = [name for name in FAMILIES if name.endswith("CausalLM")]
OTHERS: dict[str, dict[str, Any]] = {"Starcoder2": {}, "Glm": {"head_dim": 8}, "Gemma": {"head_dim": 8}, "Olmo2": {}}


def decoder(name: str) -> ModelAdapter:
    """A tiny text model of a class that is known, or of one that is adapted by watching it."""
    if name in FAMILIES:
        return adapt(build_family(name)[0].requires_grad_(False))
    config = getattr(transformers, f"{name}Config")(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, **OTHERS[name],
    )  # fmt: skip
    torch.manual_seed(0)
    return adapt(getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False))


def texts() -> list[dict[str, Tensor]]:
    """Three with padding, and one."""
    mask = (torch.arange(31) < torch.tensor([[31], [7], [30]])).long()
    ids = torch.randint(3, 60, (4, 31), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids[:3], "attention_mask": mask}, {"input_ids": ids[3:], "attention_mask": mask[:1]}]


def changed(block: nn.Module, name: str) -> None:
    """As a linear that has been quantized."""
    linear: Any = block.get_submodule(name)
    linear.weight.mul_(torch.linspace(0.5, 1.5, linear.in_features))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", [*DECODERS, *OTHERS])
def test_passes_begun_inside_are_whole_passes(name: str, autocast: torch.dtype | None) -> None:
    adapter = decoder(name)
    block = adapter.blocks[1]
    whole = began = first_block_batches(adapter, texts(), autocast)
    closing = closing_linears_of(block, began, adapter.group_heads)
    ends = [
        group[0]
        for group in adapter.linear_groups
        if len(group) == 1 and group[0].endswith(("o_proj", "down_proj", "c_proj"))
    ]
    assert list(closing) == ends
    assert len(ends) == 2
    for head in adapter.group_heads:
        if head in closing:
            began = reach(block, began, head, closing[head])
        for one, other in zip(began, whole, strict=True):
            assert torch.equal(linear_inputs(block, one, [head])[head], linear_inputs(block, other, [head])[head])
        changed(block, head)
        for one, other in zip(began, whole, strict=True):
            assert torch.equal(run_block(block, one), run_block(block, other))
    for one, other in zip(began[0].halves(), whole[0].halves(), strict=True):
        torch.testing.assert_close(run_block(block, one), run_block(block, other))
    assert [batch.reached for batch in began if batch.with_hidden(batch.hidden).reached] == []


def test_attention_is_not_computed_again(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    block, computed = adapter.blocks[0], []
    streams = first_block_batches(adapter, batches)
    closing = closing_linears_of(block, streams, adapter.group_heads)
    kept: list[Tensor] = []
    streams = reach(block, streams, "self_attn.o_proj", closing["self_attn.o_proj"], lambda x: kept.append(x) or x)
    assert [x.shape[:2] for x in kept] == [stream.hidden.shape[:2] for stream in streams]
    block.self_attn.q_proj.register_forward_hook(lambda *_: computed.append("q"))
    block.mlp.gate_proj.register_forward_hook(lambda *_: computed.append("gate"))
    for stream in streams:
        run_block(block, stream)
    assert computed == ["gate"] * 2
    assert "forward" not in vars(block.self_attn)
    run_block(block, replace(streams[0], reached=()))
    assert computed == ["gate"] * 2 + ["q", "gate"]


class Halved(nn.Module):
    """An MLP whose output is not that of its down_proj."""

    def __init__(self, mlp: Any, others: tuple[Tensor, ...], *, in_place: bool = False) -> None:
        super().__init__()
        self.up_proj, self.down_proj, self.others, self.in_place = mlp.up_proj, mlp.down_proj, others, in_place

    def forward(self, x: Tensor) -> Any:
        output = self.down_proj(self.up_proj(x).relu())
        if self.in_place:
            return output.div_(2)
        return (output, *self.others) if self.others else output / 2


class FirstOf(nn.Module):
    """The first thing that a module gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)[0]


def test_a_submodule_that_gives_more_than_its_last_linear_is_not_closed(
    adapter: ModelAdapter, batches: list[dict[str, Any]]
) -> None:
    block = adapter.blocks[0]
    streams, mlp = first_block_batches(adapter, batches), block.mlp
    for in_place in (False, True):
        block.mlp = Halved(mlp, (), in_place=in_place)
        assert list(closing_linears_of(block, streams, ["self_attn.o_proj", "mlp.down_proj"])) == ["self_attn.o_proj"]
    block.mlp = FirstOf(Halved(mlp, (torch.ones(1),)))
    assert closing_linears_of(block, streams, ["mlp.inner.down_proj"]) == {}
    block.mlp = FirstOf(Halved(mlp, (None,)))  # type: ignore[arg-type]
    assert closing_linears_of(block, streams, ["mlp.inner.down_proj"]) == {"mlp.inner.down_proj": 1}
    began = reach(block, streams, "mlp.inner.down_proj", 1)
    assert all(torch.equal(run_block(block, a), run_block(block, b)) for a, b in zip(began, streams, strict=True))


def test_no_batch_closes_nothing(adapter: ModelAdapter) -> None:
    assert closing_linears_of(adapter.blocks[0], [], adapter.group_heads) == {}


QUANTIZERS = [
    GPTQQuantizer(group_size=12), QuIPSharpQuantizer(), RTNQuantizer(group_size=12),
    AQLMQuantizer(max_rounds=1, kmeans_iterations=2, feedback_beam=2, sweep_beam=1),
]  # fmt: skip


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda quantizer: quantizer.name)
def test_a_block_is_compressed_as_from_its_inputs(
    adapter: ModelAdapter, batches: list[dict[str, Any]], quantizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [
        ModulePlan(adapter.full_name(0, name), 0, shape, "any", 2, rank, rank and 2, 1.0, "")
        for name, shape in adapter.shapes(0).items()
        for rank in [8 if name in adapter.low_rank_names else None]
    ]
    streams = first_block_batches(adapter, batches)
    noise = torch.Generator().manual_seed(7)
    student = [s.with_hidden(s.hidden + 0.3 * torch.randn(s.hidden.shape, generator=noise)) for s in streams]

    def compressed() -> tuple[nn.Module, Sequence[BlockBatch]]:
        _, seen = run_blocks_seeing(adapter.blocks[0], streams, adapter.group_heads)
        block, _, reached = BlockQuantization().compress_block(
            adapter, adapter.blocks[0], plans, copy.deepcopy(quantizer), seen, student
        )
        assert all(one == {} for one in seen)
        return block, reached

    block, reached = compressed()
    assert [one.linear for one in reached[0].reached] == ["self_attn.o_proj", "mlp.down_proj"]
    monkeypatch.setattr(compress, "closing_linears_of", lambda *_: {})
    plain, unreached = compressed()
    assert not unreached[0].reached
    for name, tensor in plain.state_dict().items():
        assert torch.equal(block.state_dict()[name], tensor), name
    with materialized(block):
        for one, other in zip(reached, student, strict=True):
            assert torch.equal(run_block(block, one), run_block(block, other))
