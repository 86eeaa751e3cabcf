"""Conversations that share an image must be what they are alone; transformers' own causal model is the oracle."""

import pytest
import torch

from casp_pl.data import CalibrationData, LlavaJson, TextFiles
from casp_pl.data.branches import join_branches, positions
from casp_pl.data.collate import Collator
from casp_pl.data.sample import Sample, Turn
from casp_pl.data.tokenize import encode_sample
from casp_pl.models.adapter import adapt
from casp_pl.models.branches import visible_pairs
from casp_pl.models.streams import first_block_batches, model_inputs, run_blocks
from casp_pl.models.tiny import load_tiny


@pytest.fixture
def conversations(tiny, llava_folder):
    """Three single questions about one image and, behind another start, a fourth."""
    image = llava_folder[0] / "7.png"
    turns = [Turn("why?", "so"), Turn("is it a long question, then?", "it is"), Turn("no?", "yes, it is no")]
    return [
        encode_sample(Sample(id=f"q{number}", turns=(turn,), images=(image,)), tiny[1], image_tokens=16)
        for number, turn in enumerate(turns)
    ]


@torch.no_grad()
def hidden(model, batch):
    return model.model(**model_inputs(batch, model.dtype), use_cache=False).last_hidden_state


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_joined_sample_computes_what_its_members_compute(tiny, conversations, attention):
    model, processor = tiny
    collator = Collator(processor)
    (joined,) = join_branches(conversations, processor.image_token_id)
    assert joined.id == "q0+2"
    assert len(joined) < sum(map(len, conversations))
    model.set_attn_implementation(attention)
    try:
        # beside a longer sample without branches, so that there is padding and a mixture
        text = encode_sample(Sample(id="t", text="plain words " * 30), processor)
        together = hidden(model, collator([joined, text]))
        branches = torch.tensor(joined.branches)
        shared = int((branches == 0).sum())
        for number, member in enumerate(conversations, start=1):
            alone = hidden(model, collator([member]))[0]
            torch.testing.assert_close(together[0, : len(joined)][branches == number], alone[shared:])
        torch.testing.assert_close(together[0, :shared], alone[:shared])
        torch.testing.assert_close(together[1, : len(text)], hidden(model, collator([text]))[0])
    finally:
        model.set_attn_implementation("sdpa")


def test_half_precision_models_take_joined_samples_too(tiny, conversations):
    processor = tiny[1]
    model = load_tiny()[0]
    batch = Collator(processor)(join_branches(conversations, processor.image_token_id))
    expected = hidden(model, batch)
    (stream,) = first_block_batches(adapt(model.to(torch.bfloat16)), [batch])
    assert stream.arguments["attention_mask"].dtype == stream.hidden.dtype == torch.bfloat16
    torch.testing.assert_close(hidden(model, batch).float(), expected, rtol=0.1, atol=0.1)


def test_blocks_one_by_one_are_the_model(tiny, conversations):
    model, processor = tiny
    batch = Collator(processor)(join_branches(conversations, processor.image_token_id))
    adapter = adapt(model)
    stream = first_block_batches(adapter, [batch])
    for block in adapter.blocks:
        stream = run_blocks(block, stream)
    torch.testing.assert_close(adapter.decoder.norm(stream[0].hidden), hidden(model, batch))


def test_labels_and_tokens_of_every_member_are_there(tiny, conversations):
    (joined,) = join_branches(conversations, tiny[1].image_token_id)
    shared = joined.branches.count(0)
    for number, member in enumerate(conversations, start=1):
        own = [place for place, branch in enumerate(joined.branches) if branch == number]
        assert [joined.input_ids[place] for place in own] == list(member.input_ids[shared:])
        assert [joined.labels[place] for place in own] == list(member.labels[shared:])
        assert [positions(joined.branches)[place] for place in own] == list(range(shared, len(member)))


def test_other_starts_are_not_joined(tiny, conversations):
    token = tiny[1].image_token_id
    other = encode_sample(
        Sample(id="z", turns=(Turn("why?", "so"), Turn("and?", "so")), images=conversations[0].images),
        tiny[1],
        image_tokens=12,
    )
    assert sorted(sample.id for sample in join_branches([*conversations, other], token)) == ["q0+2", "z"]


def test_visible_pairs_by_hand():
    batch = {"input_ids": torch.zeros(1, 6), "branches": torch.tensor([[0, 0, 1, 2, 2, -1]])}
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert visible_pairs(batch)[0].int().tolist() == expected
    assert torch.equal(visible_pairs({"input_ids": torch.zeros(2, 3)})[1], torch.ones(3, 3).tril().bool())


@pytest.fixture
def data(tiny, llava_folder, tmp_path):
    """Five questions about each of 30 images."""
    rows = [
        {
            "id": f"{number}-{question}",
            "image": f"{number}.png",
            "conversations": [
                {"from": "human", "value": "<image>\n" + "why? " * (1 + question)},
                {"from": "gpt", "value": "because"},
            ],
        }
        for number in range(30)
        for question in range(5)
    ]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some plain words, " * 300)

    def build(**settings):
        source = LlavaJson(path=llava_folder[1](rows), image_folder=llava_folder[0])
        text = TextFiles(path=tmp_path / "text")
        made = CalibrationData(source=source, text_source=text, text_length=64, text_ratio=0.25, **settings)
        made.attach(tiny[1])
        return made

    return build


def test_questions_are_taken_together_and_counted(data):
    one, four = data(samples=32), data(samples=32, questions_per_image=4)
    assert one.counts["conversations"] == one.counts["image_samples"]
    assert four.counts["conversations"] == 4 * four.counts["image_samples"]
    assert four.counts["image_tokens"] == one.counts["image_tokens"]


def test_every_batch_holds_its_share_of_text(data):
    made = data(samples=32, questions_per_image=4, batch_size=8, holdout=0)
    for loader in (made.calibration_dataloader(), made.train_dataloader()):
        texts = [sum(name.startswith("text/") for name in batch["sample_ids"]) for batch in loader]
        assert texts == [2, 2, 2, 2]


def test_fine_tuning_draws_from_more_samples_but_none_held_back(data):
    made = data(samples=16, fine_tuning_samples=48, questions_per_image=2)
    fixed, held, training = (
        {name for batch in loader for name in batch["sample_ids"]}
        for loader in (made.calibration_dataloader(), made.val_dataloader(), made.train_dataloader())
    )
    assert fixed < training
    image = {name.split("-")[0] for name in held if "-" in name}
    assert not image & {name.split("-")[0] for name in training}
    assert made.counts["fine_tuning_samples"] == len(training) > 40
