"""Samples with several images: tokens, pixels and logits are those of transformers' own processor and model."""

from pathlib import Path

import pytest
import torch

from casp_pl.data import CalibrationData, Collator, LlavaJson, Sample, TextFiles, Turn, load_image
from casp_pl.data.branches import join_branches
from casp_pl.data.questions import QuestionCollator, batch_groups, encode_questions
from casp_pl.data.selection import encode_conversations, group_by_image, join_overlapping
from casp_pl.data.tokenize import IGNORE, encode_sample, truncate
from casp_pl.errors import InputError
from casp_pl.evaluation.vqa import answer_questions, decode_answers, end_token_ids
from casp_pl.models.streams import model_inputs

TURNS = (Turn("first <image>\nthen <image>\nwhat?", "two"), Turn("and <image>\n?", "three"))
MESSAGES = [
    {"role": "user", "content": [
        {"type": "text", "text": "first "}, {"type": "image"}, {"type": "text", "text": "then "}, {"type": "image"},
        {"type": "text", "text": "what?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
    {"role": "user", "content": [{"type": "text", "text": "and "}, {"type": "image"}, {"type": "text", "text": "?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "three"}]},
]  # fmt: skip


@pytest.fixture
def files(llava_folder):
    return tuple(llava_folder[0] / f"{number}.png" for number in range(30))


@torch.no_grad()
def hidden(model, batch):
    return model.model(**model_inputs(batch, model.dtype), use_cache=False).last_hidden_state


def test_tokens_and_pixels_are_those_of_the_processor(tiny, files):
    _, processor = tiny
    sample = Sample(id="s", turns=TURNS, images=files[3:6])
    encoded = encode_sample(sample, processor, image_tokens=16)
    text = processor.apply_chat_template(MESSAGES, tokenize=False)
    theirs = processor(images=[load_image(file) for file in files[3:6]], text=[text], return_tensors="pt")
    assert list(encoded.input_ids) == theirs["input_ids"][0].tolist()
    assert encoded.image_tokens == 48
    assert torch.equal(Collator(processor)([encoded])["pixel_values"], theirs["pixel_values"])
    labels = [label for label in encoded.labels if label != IGNORE]
    assert processor.tokenizer.decode(labels) == "two<|im_end|>three<|im_end|>"


def test_images_may_take_different_numbers_of_tokens(tiny, files):
    sample = Sample(id="s", turns=TURNS, images=files[3:6])
    ids = encode_sample(sample, tiny[1], image_tokens=(2, 5, 3)).input_ids
    runs = "".join("i" if token == tiny[1].image_token_id else "." for token in ids).split(".")
    assert [len(run) for run in runs if run] == [2, 5, 3]


def test_without_marks_all_images_stand_in_front(tiny, files):
    in_front = encode_sample(Sample(id="s", turns=(Turn("what?", "two"),), images=files[:2]), tiny[1], image_tokens=16)
    marked = Sample(id="s", turns=(Turn("<image><image>what?", "two"),), images=files[:2])
    assert in_front == encode_sample(marked, tiny[1], image_tokens=16)


def test_neighbours_do_not_change_a_sample_with_several_images(tiny, files):
    model, processor = tiny
    several = encode_sample(Sample(id="s", turns=TURNS, images=files[3:6]), processor, image_tokens=16)
    one = encode_sample(Sample(id="o", turns=(Turn("why?", "so"),), images=files[9:10]), processor, image_tokens=16)
    text = encode_sample(Sample(id="t", text="plain words " * 20), processor)
    collator = Collator(processor)
    batch = hidden(model, collator([one, text, several]))
    for row, sample in enumerate((one, text, several)):
        torch.testing.assert_close(batch[row, : len(sample)], hidden(model, collator([sample]))[0])


def test_conversations_about_the_same_images_are_joined(tiny, files):
    model, processor = tiny
    turns = [Turn("<image>\n<image>\nwhy?", "so"), Turn("<image>\n<image>\nwhat is it then?", "it is two")]
    samples = [Sample(id=f"q{number}", turns=(turn,), images=files[:2]) for number, turn in enumerate(turns)]
    other = Sample(id="z", turns=(Turn("<image>\nor <image>\n?", "so"),), images=files[:2])
    encoded, skipped = encode_conversations([*samples, other], processor, 500)
    assert skipped == []
    joined, alone = sorted(encoded, key=lambda sample: sample.id)
    assert (joined.id, alone.id) == ("q0+1", "z")
    assert joined.image_tokens == 32
    states = hidden(model, Collator(processor)([joined, alone]))
    for number, sample in enumerate(samples, start=1):
        member = encode_sample(sample, processor, image_tokens=16)
        own = torch.tensor(joined.branches) == number
        expected = hidden(model, Collator(processor)([member]))[0, joined.branches.count(0) :]
        torch.testing.assert_close(states[0, : len(joined)][own], expected)


def test_all_text_counts_but_images_and_the_first_token_of_a_branch(tiny, files):
    processor = tiny[1]
    turn = (Turn("why?", "so"),)
    pair = [Sample(id=str(number), turns=turn, images=files[:1]) for number in range(2)]
    encoded = [encode_sample(sample, processor, image_tokens=16, counted="all") for sample in pair]
    ids = encoded[0].input_ids
    wanted = [IGNORE, *(IGNORE if token == processor.image_token_id else token for token in ids[1:])]
    assert list(encoded[0].labels) == wanted
    (joined,) = join_branches(encoded, processor.image_token_id)
    shared = joined.branches.count(0)
    assert joined.labels[shared] == IGNORE
    assert joined.labels[shared + 1 : len(ids)] == ids[shared + 1 :]


def test_truncation_never_loses_an_image(tiny, files):
    encoded = encode_sample(Sample(id="s", turns=TURNS, images=files[:3]), tiny[1], image_tokens=16)
    token = tiny[1].image_token_id
    last = len(encoded) - encoded.input_ids[::-1].index(token)
    assert truncate(encoded, last, token).input_ids == encoded.input_ids[:last]
    assert truncate(encoded, last - 1, token) is None
    _, (skipped,) = encode_conversations([Sample(id="s", turns=TURNS, images=files[:3])], tiny[1], last - 1)
    assert "or not all its images" in skipped.reason


def test_one_broken_image_of_several_skips_the_sample(tiny, files):
    files[4].write_bytes(b"")
    encoded, (skipped,) = encode_conversations([Sample(id="s", turns=TURNS, images=files[3:6])], tiny[1], 500)
    assert encoded == []
    assert "4.png: empty file" in skipped.reason


def test_groups_that_share_an_image_are_never_parted():
    def sample(name, *images):
        return Sample(id=name, turns=(Turn("q", "a"),), images=tuple(map(Path, images)))

    samples = [sample("a", "1"), sample("b", "2"), sample("c", "3"), sample("d", "2", "4"), sample("e", "4", "1")]
    groups = join_overlapping(group_by_image([*samples, sample("f", "3")]))
    assert [[member.id for member in group] for group in groups] == [["a", "b", "d", "e"], ["c", "f"]]
    alone = group_by_image([sample("a", "1"), sample("b", "2"), sample("c", "1"), Sample(id="t", text="x")])
    assert join_overlapping(alone) == alone


def test_calibration_with_pairs_of_images(tiny, llava_folder, tmp_path):
    rows = [
        {
            "id": f"{number}",
            "image": [f"{number}.png", f"{(number + 1) % 30}.png"] if number % 3 else f"{number}.png",
            "conversations": [
                {"from": "human", "value": ("<image>\n<image>\n" if number % 3 else "<image>\n") + "what?"},
                {"from": "gpt", "value": "that"},
            ],
        }
        for number in range(30)
    ]
    source = LlavaJson(path=llava_folder[1](rows), image_folder=llava_folder[0])
    (tmp_path / "a.txt").write_text("some plain words, " * 99)
    data = CalibrationData(
        source=source, text_source=TextFiles(path=tmp_path / "a.txt"), samples=24, text_ratio=0.25, text_length=48,
        holdout=0.0, batch_size=5,
    )  # fmt: skip
    data.attach(tiny[1])
    batches = list(data.calibration_dataloader())
    for batch in batches:
        assert int((batch["input_ids"] == tiny[1].image_token_id).sum()) == 16 * len(batch.get("pixel_values", ()))
    counts = data.counts
    assert counts["images"] == sum(len(batch.get("pixel_values", ())) for batch in batches) > counts["image_samples"]
    assert counts["image_tokens"] == 16 * counts["images"]
    answers = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
    assert counts["counted_tokens"] == answers


def test_questions_about_several_images_are_answered_as_generate_does(tiny, files):
    model, processor = tiny
    samples = [
        Sample(id="a", turns=(Turn("<image>\n<image>\nwhat?", "x"),), images=files[:2]),
        Sample(id="b", turns=(Turn("<image>\n<image>\nand why?", "x"),), images=files[:2]),
        Sample(id="c", turns=(Turn("what?", "x"),), images=files[5:6]),
    ]
    groups, _ = encode_questions(samples, processor)
    for batch in map(QuestionCollator(processor), batch_groups(groups, 2)):
        answered = answer_questions(model, batch, max_new_tokens=4)
        texts = decode_answers(answered.tokens, processor, end_token_ids(model))
        for name, text in zip(batch["sample_ids"], texts, strict=True):
            sample = next(sample for sample in samples if sample.id == name)
            marks = "<image>\n" * len(sample.images)
            question = sample.turns[0].question.replace("<image>\n", "")
            prompt = f"<|im_start|>user\n{marks}{question}<|im_end|>\n<|im_start|>assistant\n"
            images = [load_image(image) for image in sample.images]
            inputs = processor(images=images, text=[prompt], add_special_tokens=False, return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert text == processor.tokenizer.decode(output, skip_special_tokens=True).strip()


def test_conversations_are_no_text_windows(tiny, llava_folder):
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    source = LlavaJson(path=llava_folder[1]([{"conversations": talk}]), image_folder=llava_folder[0])
    data = CalibrationData(text_source=source, text_ratio=1, samples=1)
    data.attach(tiny[1])
    with pytest.raises(InputError, match="train.json#0 is a conversation"):
        data.setup()
