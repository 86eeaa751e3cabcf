"""The two fine-tuning losses against their formulas, written token by token."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from casp_pl.models import adapt, load_model
from casp_pl.models.streams import first_block_batches
from casp_pl.modules.blockwise import BlockwiseModule, relative_error
from casp_pl.modules.end_to_end import EndToEndModule, answer_mask, target_mask, teacher_states
from casp_pl.modules.parameters import relative_groups, trainable_parameters, warmed_cosine


def test_relative_error_is_the_weighted_mean_of_the_tokens_own() -> None:
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 5, 7, generator=generator), torch.randn(2, 5, 7, generator=generator)
    target[0, 0] *= 1000  # a massive activation counts like any other token
    weight = torch.ones(2, 5)
    weight[0, 1:3], weight[1, 3:] = 0.1, 0.0
    shares = [
        [float((output[b, t] - target[b, t]).norm() / target[b, t].norm()) ** 2 for t in range(5)] for b in (0, 1)
    ]
    expected = (sum(shares[0]) - 0.9 * (shares[0][1] + shares[0][2]) + sum(shares[1][:3])) / (3 + 0.2 + 3)
    assert float(relative_error(output, target, weight)) == pytest.approx(expected, rel=1e-5)


def test_a_window_is_compared_behind_its_last_block_and_images_count_less() -> None:
    adapter, generator = adapt(load_model("tiny")[0]), torch.Generator().manual_seed(5)
    ids = torch.randint(0, 200, (2, 21), generator=generator)
    ids[:, 3:19] = 258
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][1, 20:] = 0
    batch["pixel_values"] = torch.randn(2, 3, 32, 32, generator=generator)
    (inputs,) = first_block_batches(adapter, [batch])
    outputs = []
    for block in adapter.blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        adapter.model(**batch)
        target = torch.randn(outputs[-1].shape, generator=generator)
        window = BlockwiseModule(list(adapter.blocks), [(inputs, target)], [], image_weight=0.25)
        actual = window.batch_loss((inputs, target))
    errors = (outputs[len(adapter.blocks) - 1] - target).square().sum(-1) / target.square().sum(-1)
    text, image = [errors[0, :3], errors[1, :3], errors[0, 19:], errors[1, 19:20]], errors[:, 3:19]
    expected = (sum(part.sum() for part in text) + 0.25 * image.sum()) / (3 + 3 + 2 + 1 + 0.25 * 32)
    torch.testing.assert_close(actual, expected)


def test_warmed_cosine_rises_then_falls_to_its_floor() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, rates = warmed_cosine(optimizer, 10, 0.4), []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [0.5, 1.0, 1.5, 2.0] + [2 * (0.05 + 0.475 * (1 + math.cos(math.pi * k / 6))) for k in range(7)]
    assert rates == pytest.approx(expected)


def test_teacher_states_give_the_original_logits() -> None:
    model, _ = load_model("tiny")
    ids = torch.randint(0, 200, (2, 21), generator=torch.Generator().manual_seed(1))
    ids[:, 3:19] = 258
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)),
        "labels": ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.6, -100),
        "sample_ids": ["a", "b"],
    }
    adapter = adapt(model)
    states = teacher_states(adapter, [batch])
    with torch.no_grad():
        logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}).logits
        before_a_label = [place for place in range(20) if batch["labels"][1, place + 1] != -100]
        assert target_mask(batch)[1].nonzero().flatten().tolist() == before_a_label
        torch.testing.assert_close(adapter.head(states["b"]), logits[1][before_a_label], rtol=1e-4, atol=1e-5)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.clone())
        return kept[-1]

    again = teacher_states(adapter, [batch], keep)
    assert all(torch.equal(again[name], states[name]) for name in ("a", "b"))
    places = {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert {again[name].untyped_storage().data_ptr() for name in ("a", "b")} <= places, "nothing but what is kept"


def test_a_sample_is_taken_from_its_first_batch_wherever_the_stage_goes_on() -> None:
    """What it is padded to in later batches changes last bits."""
    adapter, generator = adapt(load_model("tiny")[0]), torch.Generator().manual_seed(5)
    lengths = {"a": 9, "b": 40, "c": 12, "d": 30, "e": 20}
    ids = {name: torch.randint(0, 200, (length,), generator=generator) for name, length in lengths.items()}

    def batch(*names: str) -> dict[str, Any]:
        rows = torch.nn.utils.rnn.pad_sequence([ids[name] for name in names], batch_first=True)
        real = torch.arange(rows.shape[1]) < torch.tensor([[len(ids[name])] for name in names])
        labels = rows.masked_fill(~real, -100)
        return {"input_ids": rows, "attention_mask": real.long(), "labels": labels, "sample_ids": list(names)}

    seen: list[tuple[str, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tensor.shape))
        return tensor

    epochs = [batch("a", "c"), batch("b", "d"), batch("a", "b"), batch("c", "d", "e")]
    first = teacher_states(adapter, [epochs[3]])
    first |= {name: states for one in epochs[:2] for name, states in teacher_states(adapter, [one]).items()}
    for needed in (None, {"b", "c", "d", "e"}, {"d"}):
        seen.clear()
        states = teacher_states(adapter, epochs, keep, needed=needed)
        assert all(torch.equal(states[name], first[name]) for name in needed or ids)
        assert ((2, 12, 48) in seen, (2, 40, 48) in seen) == (needed != {"d"}, True), (
            "what is not needed is not computed"
        )


def test_relative_groups_follow_each_tensor() -> None:
    small, large = nn.Parameter(torch.full((3,), 0.01)), nn.Parameter(torch.full((5,), 2.0))
    groups = relative_groups([small, large], 0.1)
    torch.testing.assert_close(torch.tensor([group["lr"] for group in groups]), torch.tensor([0.001, 0.2]))


def test_dense_weights_of_the_model_are_never_trained() -> None:
    model, _ = load_model("tiny")
    chosen = trainable_parameters(adapt(model).blocks[0])
    assert {tuple(parameter.shape) for parameter in chosen} == {(48,)}, "in an uncompressed block only the norms"


def test_answers_are_the_labelled_tokens_of_conversations_only() -> None:
    labels = torch.tensor([[-100, -100, 5, 6, -100], [7, 8, 9, -100, -100], [-100, 3, -100, 4, 2]])
    real = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0]]
    assert answer_mask({"labels": labels, "attention_mask": real}).int().tolist() == expected


def test_the_loss_is_the_kl_of_the_text_plus_the_weighted_kl_of_the_answers() -> None:
    adapter, generator = adapt(load_model("tiny")[0]), torch.Generator().manual_seed(4)
    ids = torch.randint(0, 200, (2, 9), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[0, 6:8], labels[1, 1:] = ids[0, 6:8], ids[1, 1:]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "sample_ids": ["a", "b"]}
    teacher = {name: states + 0.1 for name, states in teacher_states(adapter, [batch]).items()}
    with torch.no_grad():
        student = adapter.model(input_ids=ids).logits.log_softmax(-1)

        def divergence(states, of_student):
            target = adapter.head(states).log_softmax(-1)
            return (target.exp() * (target - of_student)).sum(-1).mean()

        expected = divergence(teacher["b"], student[1, :8]) + 3.0 * divergence(teacher["a"], student[0, 5:7])
        actual = EndToEndModule(adapter, teacher, answer_weight=3.0).batch_loss(batch)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
