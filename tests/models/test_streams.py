"""Activations block by block against hooks on whole runs of the model."""

from typing import Any

import torch
from torch import Tensor

from casp_pl.models import ModelAdapter
from casp_pl.models.streams import (
    first_block_batches,
    linear_inputs,
    model_inputs,
    run_block,
    run_blocks,
    run_blocks_seeing,
)


def _hooked_inputs(adapter: ModelAdapter, number: int, batch: dict[str, Any]) -> dict[str, Tensor]:
    """What every linear of a block reads at real tokens while the whole model runs."""
    real, seen, handles = batch["attention_mask"].bool(), {}, []
    for name in adapter.linear_names:

        def hook(_: Any, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            seen[name] = inputs[0][real]

        handles.append(adapter.blocks[number].get_submodule(name).register_forward_hook(hook))
    adapter.model(**model_inputs(batch))
    for handle in handles:
        handle.remove()
    return seen


def test_linear_inputs_are_those_of_a_whole_run(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    streams = first_block_batches(adapter, batches)
    for number, block in enumerate(adapter.blocks):
        for stream, batch in zip(streams, batches, strict=True):
            actual, expected = (
                linear_inputs(block, stream, adapter.linear_names),
                _hooked_inputs(adapter, number, batch),
            )
            assert actual.keys() == expected.keys()
            for name, inputs in expected.items():
                assert len(inputs) == batch["attention_mask"].sum()
                torch.testing.assert_close(actual[name], inputs)
        outputs, inputs = run_blocks_seeing(block, streams, adapter.linear_names)
        again = [linear_inputs(block, stream, adapter.linear_names) for stream in streams]
        assert all(torch.equal(a[name], b[name]) for a, b in zip(inputs, again, strict=True) for name in a)
        streams = run_blocks(block, streams)
        assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(outputs, streams, strict=True))


def test_all_blocks_and_the_norm_give_the_last_hidden_state(
    adapter: ModelAdapter, batches: list[dict[str, Any]]
) -> None:
    streams = first_block_batches(adapter, batches)
    for block in adapter.blocks:
        streams = run_blocks(block, streams)
    for stream, batch in zip(streams, batches, strict=True):
        expected = adapter.model.model(**model_inputs(batch)).last_hidden_state
        assert expected.shape == stream.hidden.shape
        actual = adapter.decoder.norm(stream.hidden)
        torch.testing.assert_close(actual[stream.real], expected[stream.real])


def test_padding_reaches_no_real_token(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    text = batches[1]
    alone = {key: value[:1, :5] for key, value in text.items()}
    padded, short = (run_blocks(adapter.blocks[0], first_block_batches(adapter, [batch]))[0] for batch in (text, alone))
    torch.testing.assert_close(padded.hidden[:1, :5], short.hidden)


def test_masks(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    images, texts = first_block_batches(adapter, batches)
    assert images.real.sum(1).tolist() == [21, 25]
    assert images.image.sum(1).tolist() == [16, 16]
    assert images.image[:, 3:19].all()
    assert texts.real.sum(1).tolist() == [5, 13, 9]
    assert not texts.image.any()


def test_the_pass_ends_once_all_is_seen_and_leaves_no_hook(
    adapter: ModelAdapter, batches: list[dict[str, Any]]
) -> None:
    before = adapter.model(**model_inputs(batches[0])).logits
    stream = first_block_batches(adapter, batches[:1])[0]
    block, late = adapter.blocks[0], []
    handle = block.mlp.register_forward_hook(lambda *_: late.append(True))
    assert list(linear_inputs(block, stream, ["self_attn.q_proj"])) == ["self_attn.q_proj"]
    assert not late
    run_block(block, stream)
    assert late
    handle.remove()
    assert torch.equal(adapter.model(**model_inputs(batches[0])).logits, before)


def test_autocast_streams_multiply_in_bf16_and_stay_close(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    exact, half = first_block_batches(adapter, batches), first_block_batches(adapter, batches, torch.bfloat16)
    block = adapter.blocks[0]
    assert linear_inputs(block, half[0], ["mlp.down_proj"])["mlp.down_proj"].dtype == torch.bfloat16
    for a, b in zip(run_blocks(block, exact), run_blocks(block, half), strict=True):
        assert b.hidden.dtype == torch.float32, "the residual stream keeps full precision"
        error = (a.hidden - b.hidden)[a.real].norm() / a.hidden[a.real].norm()
        assert 0 < error < 0.01
