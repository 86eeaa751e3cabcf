"""The questions of lmms-eval's tasks as the model sees them: images at their places, videos, sampling, likelihoods."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from casp_pl.data.video import FRAMES
from casp_pl.errors import ConfigError
from casp_pl.harness.answering import generate_answers, generation_settings, log_likelihoods
from casp_pl.harness.questions import question_sample
from casp_pl.models.families import build_family
from casp_pl.models.tiny import load_tiny

COLOURS = ("red", "blue", "lime")


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load_tiny()


@pytest.fixture(scope="module")
def with_video() -> tuple[Any, Any]:
    return build_family("LlavaOnevisionForConditionalGeneration")


def images(*colours: str) -> list[Image.Image]:
    return [Image.new("RGB", (32, 32), colour) for colour in colours]


def generated(model: Any, processor: Any, prompt: str, **inputs: Any) -> str:
    """What transformers makes of a prompt in its own words."""
    given = processor(text=[prompt], return_tensors="pt", add_special_tokens=False, **inputs)
    with torch.no_grad():
        tokens = model.generate(**given, do_sample=False, max_new_tokens=6, pad_token_id=0)
    return processor.tokenizer.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("first <image>\nthen <image>\n: which is red?", "first <image>\nthen <image>\n: which is red?"),
        ("which is red?", "<image>\n<image>\nwhich is red?"),
    ],
)
def test_images_stand_where_the_task_puts_them(tiny: tuple[Any, Any], text: str, shown: str) -> None:
    model, processor = tiny
    shots = images("red", "blue")
    (answer,) = generate_answers(
        model, processor, [question_sample("q", text, shots, processor)], {"max_new_tokens": 6}
    )
    prompt = f"<|im_start|>user\n{shown}<|im_end|>\n<|im_start|>assistant\n"
    assert answer == generated(model, processor, prompt, images=shots)
    other = "<image>\n<image>\nfirst \nthen \n: which is red?"
    if text.startswith("first"):
        front = question_sample("q", other, shots, processor)
        here = question_sample("q", text, shots, processor)
        assert front.turns != here.turns


def test_marks_that_fit_no_image_are_said(tiny: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        sample = question_sample("task/7", "<image> and again <image>", images("red"), tiny[1])
    assert "task/7: 2 image marks for 1 images" in caplog.text
    assert sample.turns[0].question == "and again"
    assert len(sample.images) == 1


def test_a_video_is_one_video_to_the_model(with_video: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = with_video
    frames = [Image.new("RGB", (24, 20), (20 * number, 0, 0)) for number in range(FRAMES)]
    for number, frame in enumerate(frames):
        frame.save(tmp_path / f"{number}.png")
    sample = question_sample("q", "what happens?", [str(tmp_path)], processor)
    (answer,) = generate_answers(model, processor, [sample], {"max_new_tokens": 6})
    prompt = "<|im_start|>user\n<video>\nwhat happens?<|im_end|>\n<|im_start|>assistant\n"
    assert answer == generated(model, processor, prompt, videos=[frames])


@pytest.mark.parametrize(
    ("visuals", "message"),
    [
        (["clip.mp4"], "shows videos, the model takes images alone"),
        ([*images("red"), "clip.mp4"], "shows Image, str; images or one path of a video"),
        ([{"array": []}], "shows dict; images or one path of a video"),
    ],
)
def test_what_the_model_does_not_take_is_said(tiny: tuple[Any, Any], visuals: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        question_sample("q", "what?", visuals, tiny[1])
    with pytest.raises(ConfigError, match="the model takes text alone"):
        question_sample("q", "what?", visuals, tiny[1].tokenizer)


def test_batches_of_any_lengths_answer_as_one_by_one(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    shown = [images("red"), [], images("blue", "lime")]
    texts = ["what colour is it?", "hello there, how are you today? " * 3, "and these?"]
    samples = [
        question_sample(str(number), text, shots, processor)
        for number, (text, shots) in enumerate(zip(texts, shown, strict=True))
    ]
    settings = {"max_new_tokens": 6, "until": "\n"}
    alone = [generate_answers(model, processor, [sample], settings)[0] for sample in samples]
    assert len(set(alone)) > 1
    assert generate_answers(model, processor, samples, settings) == alone


@pytest.mark.parametrize(
    ("asked", "sampled"),
    [
        ({}, False),
        ({"temperature": 0, "do_sample": True}, False),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"do_sample": True}, True),
        ({"temperature": 0.7, "top_p": 0.9}, True),
    ],
)
def test_sampling_is_what_the_task_asks_for(asked: dict[str, Any], sampled: bool) -> None:
    settings = generation_settings(asked)
    assert settings["do_sample"] is sampled
    for name in ("temperature", "top_p"):
        assert settings.get(name) == (asked.get(name) if sampled else None)


def test_sampled_answers_differ_and_follow_the_seed(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    samples = [question_sample("q", "what?", images("red"), processor)] * 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first = generate_answers(model, processor, samples, {"do_sample": True, "max_new_tokens": 6})
        torch.manual_seed(3)
        again = generate_answers(model, processor, samples, {"do_sample": True, "max_new_tokens": 6})
    assert first == again
    assert len(set(first)) > 1


def test_likelihoods_are_those_of_the_whole_conversation(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    shots = images("red")
    answers = ["red", "a much longer answer", "blue"]
    samples = [question_sample("q", "what colour?", shots, processor, answer) for answer in answers]
    expected = []
    for answer in answers:
        prompt = "<|im_start|>user\n<image>\nwhat colour?<|im_end|>\n<|im_start|>assistant\n"
        start, whole = (
            processor(text=[text], images=shots, return_tensors="pt", add_special_tokens=False)
            for text in (prompt, f"{prompt}{answer}<|im_end|>")
        )
        with torch.no_grad():
            scores = model(**whole).logits[0].double().log_softmax(-1)
        ids = whole["input_ids"][0]
        expected.append(sum(scores[at - 1, ids[at]].item() for at in range(start["input_ids"].shape[1], len(ids))))
    found = log_likelihoods(model, processor, samples)
    assert [score for score, _ in found] == pytest.approx(expected, rel=1e-4)
    assert not any(greedy for _, greedy in found)
    (greedy_answer,) = generate_answers(model, processor, samples[:1], {"max_new_tokens": 3})
    ((_, greedy),) = log_likelihoods(model, processor, [question_sample("q", "what colour?", shots, processor, "red")])
    assert greedy == (greedy_answer == "red")
