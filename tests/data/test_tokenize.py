from pathlib import Path

import pytest
import torch

from casp_pl.data import Collator, EasyVQA, Sample, Turn, load_image
from casp_pl.data.tokenize import (
    IGNORE,
    count_image_tokens,
    encode_prompt,
    encode_sample,
    encode_windows,
    truncate,
)
from casp_pl.errors import ConfigError, InputError

TURNS = (Turn("What is it?", "a red bus"), Turn("Sure?", "yes"))
LLAVA_TEMPLATE = (  # the form of LLaVA-1.5: no end token, a space behind every text
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def image_sample(folder, turns=TURNS):
    return Sample(id="s", turns=turns, images=(Path(folder) / "3.png",))


def labelled_text(encoded, tokenizer):
    return tokenizer.decode([label for label in encoded.labels if label != IGNORE])


def test_tokens_are_those_of_the_processor(tiny, llava_folder):
    _, processor = tiny
    sample = image_sample(llava_folder[0])
    image = load_image(sample.image)
    encoded = encode_sample(sample, processor, image_tokens=count_image_tokens(processor, image))
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "a red bus"}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    theirs = processor(images=[image], text=[text], return_tensors="pt")
    assert list(encoded.input_ids) == theirs["input_ids"][0].tolist()
    assert encoded.image_tokens == 16
    batch = Collator(processor)([encoded])
    assert torch.equal(batch["pixel_values"], theirs["pixel_values"])


def test_labels_are_the_answers_with_their_end_tokens(tiny, llava_folder):
    _, processor = tiny
    encoded = encode_sample(image_sample(llava_folder[0]), processor, image_tokens=16)
    assert labelled_text(encoded, processor.tokenizer) == "a red bus<|im_end|>yes<|im_end|>"
    assert all(label in (IGNORE, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))


def test_labels_with_the_template_of_llava(tiny, llava_folder, monkeypatch):
    _, processor = tiny
    monkeypatch.setattr(processor, "chat_template", LLAVA_TEMPLATE)
    encoded = encode_sample(image_sample(llava_folder[0]), processor, image_tokens=16)
    assert labelled_text(encoded, processor.tokenizer) == " a red bus yes"


def test_a_template_that_rewrites_the_past_is_refused(tiny, llava_folder, monkeypatch):
    _, processor = tiny
    monkeypatch.setattr(processor, "chat_template", "{{ messages | length }}" + LLAVA_TEMPLATE)
    with pytest.raises(ConfigError, match="turn by turn"):
        encode_sample(image_sample(llava_folder[0]), processor, image_tokens=16)


def test_the_prompt_is_the_beginning_of_the_sample(tiny, llava_folder):
    _, processor = tiny
    sample = image_sample(llava_folder[0])
    prompt = encode_prompt(sample, processor, image_tokens=16)
    whole = encode_sample(sample, processor, image_tokens=16)
    assert prompt.input_ids == whole.input_ids[: len(prompt)]
    assert whole.labels[len(prompt)] == whole.input_ids[len(prompt)]
    assert set(whole.labels[: len(prompt)]) == {IGNORE}


@pytest.mark.parametrize(
    "sample",
    [
        Sample(id="s9", text="a text with an <image> mark"),
        Sample(id="s9", turns=(Turn("what is <image>?", "no"),)),
        Sample(id="s9", turns=(Turn("what is <image>?", "no"),), images=(Path("3.png"), Path("4.png"))),
        Sample(id="s9", turns=(Turn("what is it?", "an <image>"),), images=(Path("3.png"),)),
    ],
)
def test_image_marks_must_match_the_images(tiny, sample):
    with pytest.raises(InputError, match="Sample s9: . image marks in the text, but . images"):
        encode_sample(sample, tiny[1], image_tokens=16)


def test_plain_tokenizers(tiny, monkeypatch):
    tokenizer = tiny[1].tokenizer
    sample = Sample(id="s", turns=TURNS)
    with pytest.raises(ConfigError, match="no chat template"):
        encode_sample(sample, tokenizer)
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert labelled_text(encode_sample(sample, tokenizer), tokenizer) == "a red busyes"
    with pytest.raises(InputError, match="takes none"):
        encode_sample(image_sample("."), tokenizer)


def test_text_labels_are_everything_but_the_start(tiny):
    encoded = encode_sample(Sample(id="t", text="some text"), tiny[1])
    assert encoded.labels == (IGNORE, *encoded.input_ids[1:])


def test_truncation(tiny, llava_folder):
    encoded = encode_sample(image_sample(llava_folder[0]), tiny[1], image_tokens=16)
    start = encoded.labels.index(next(label for label in encoded.labels if label != IGNORE))
    assert truncate(encoded, len(encoded)) is encoded
    assert truncate(encoded, start) is None
    cut = truncate(encoded, start + 2)
    assert (cut.input_ids, cut.labels) == (encoded.input_ids[: start + 2], encoded.labels[: start + 2])


def test_windows_hold_the_whole_text_in_order(tiny):
    tokenizer = tiny[1].tokenizer
    samples = [Sample(id=str(number), text=f"text number {number}, " * 3) for number in range(5)]
    windows = list(encode_windows(samples, tiny[1], length=17))
    text = "".join(f"{sample.text}\n\n" for sample in samples)
    ids = tokenizer(text)["input_ids"]
    assert [token for window in windows for token in window.input_ids] == ids[: len(ids) // 17 * 17]
    assert {len(window) for window in windows} == {17}
    assert len({window.id for window in windows}) == len(windows)


def test_windows_start_with_the_start_token_of_llama(tiny):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = type(tiny[1].tokenizer._tokenizer).from_str(tiny[1].tokenizer._tokenizer.to_str())
    start = tiny[1].tokenizer.bos_token_id
    backend.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>")
    windows = list(encode_windows([Sample(id="a", text="x" * 30)], tokenizer, length=8))
    assert [window.input_ids[0] for window in windows] == [start] * 4
    assert tokenizer.decode([token for window in windows for token in window.input_ids[1:]]) == "x" * 28


def test_collate_pads_right_and_mixes_text_with_images(tiny, llava_folder):
    _, processor = tiny
    samples = [
        encode_sample(Sample(id="t", text="short"), processor),
        encode_sample(image_sample(llava_folder[0]), processor, image_tokens=16),
        encode_sample(image_sample(llava_folder[0], TURNS[:1]), processor, image_tokens=16),
    ]
    batch = Collator(processor)(samples)
    assert batch["sample_ids"] == ["t", "s", "s"]
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["pixel_values"].dtype == torch.float32
    longest = max(map(len, samples))
    for row, sample in enumerate(samples):
        real = len(sample)
        assert batch["input_ids"][row, :real].tolist() == list(sample.input_ids)
        assert batch["labels"][row, :real].tolist() == list(sample.labels)
        assert batch["attention_mask"][row].tolist() == [1] * real + [0] * (longest - real)
        assert (batch["labels"][row, real:] == IGNORE).all()
    assert "pixel_values" not in Collator(processor)(samples[:1])


def test_padding_and_neighbours_do_not_change_a_sample(tiny, llava_folder):
    model, processor = tiny
    alone = encode_sample(image_sample(llava_folder[0], TURNS[:1]), processor, image_tokens=16)
    longer = encode_sample(image_sample(llava_folder[0]), processor, image_tokens=16)
    collator = Collator(processor)
    with torch.no_grad():
        expected = model(**{k: v for k, v in collator([alone]).items() if k != "sample_ids"}).logits[0]
        batch = collator([longer, alone])
        batch.pop("sample_ids")
        mixed = model(**batch).logits[1, : len(alone)]
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.demo
def test_the_demo_processor_makes_64_image_tokens():
    from casp_pl.models.demo import load_processor

    processor = load_processor()
    sample = EasyVQA().load("train")[0]
    image_tokens = count_image_tokens(processor, load_image(sample.image))
    encoded = encode_sample(sample, processor, image_tokens=image_tokens)
    assert image_tokens == encoded.input_ids.count(processor.image_token_id) == 64
    assert labelled_text(encoded, processor.tokenizer) == "rectangle<|im_end|>"
