import pytest
import torch

from casp_pl.data import EasyVQA, EvaluationData, LlavaJson
from casp_pl.data.questions import QuestionCollator, batch_groups, choose_questions, encode_questions
from casp_pl.data.tokenize import encode_prompt
from casp_pl.errors import ConfigError, InputError


def test_whole_images_then_a_cut():
    samples = EasyVQA().load("test")
    chosen = choose_questions(samples, 100, seed=0)
    assert len(chosen) == 100
    everything = {}
    for sample in samples:
        everything.setdefault(sample.image, []).append(sample)
    taken = {}
    for sample in chosen:
        taken.setdefault(sample.image, []).append(sample)
    *whole, last = taken
    assert all(taken[image] == everything[image] for image in whole)
    assert taken[last] == everything[last][: len(taken[last])]
    assert chosen == choose_questions(samples, 100, seed=0)
    assert chosen != choose_questions(samples, 100, seed=1)
    assert choose_questions(samples, None, seed=0) == samples


def test_prefix_and_suffix_are_the_prompt(tiny):
    _, processor = tiny
    samples = choose_questions(EasyVQA().load("test"), 25, seed=0)
    groups, skipped = encode_questions(samples, processor)
    assert skipped == []
    numbers = []
    for batch in map(QuestionCollator(processor), batch_groups(groups, 2)):
        assert batch["image_inputs"]["pixel_values"].shape == (len(batch["prefix_ids"]), 3, 32, 32)
        for row, name in enumerate(batch["sample_ids"]):
            prefix = batch["prefix_ids"][batch["image_of_row"][row]]
            suffix = batch["suffix_ids"][row][batch["suffix_mask"][row].bool()]
            sample = next(sample for sample in samples if sample.id == name)
            prompt = encode_prompt(sample, processor, image_tokens=16)
            assert torch.cat([prefix, suffix]).tolist() == list(prompt.input_ids)
            assert batch["answers"][row] == (sample.turns[0].answer,)
        numbers += batch["numbers"].tolist()
    assert numbers == list(range(25))


def test_loaders(tiny):
    data = EvaluationData(questions=20, text_tokens=200, window=64, windows_per_batch=2)
    data.attach(tiny[1])
    questions, windows = data.test_dataloader()
    assert sum(len(batch["answers"]) for batch in questions) == 20
    assert [tuple(batch["input_ids"].shape) for batch in windows] == [(2, 64), (1, 64)]
    assert [number for batch in windows for number in batch["numbers"].tolist()] == [0, 1, 2]
    assert data.counts["questions"] == 20
    assert data.counts["text_tokens"] == 192


def test_a_text_model_gets_the_text_alone(tiny):
    data = EvaluationData(questions=20, text_tokens=128, window=64)
    data.attach(tiny[1].tokenizer)
    (windows,) = data.test_dataloader()
    assert next(iter(windows))["input_ids"].shape == (2, 64)


def test_errors(tiny, llava_folder):
    with pytest.raises(ConfigError, match="window"):
        EvaluationData(window=1)
    with pytest.raises(ConfigError, match="less than one window"):
        EvaluationData(text_tokens=100, window=256)
    data = EvaluationData(questions=0, text_tokens=10**7)
    data.attach(tiny[1])
    with pytest.raises(InputError, match="the held-out text has only"):
        data.setup()
    images, write = llava_folder
    source = LlavaJson(path=write([]), image_folder=images, test_path=write([], "test.json"))
    data = EvaluationData(source=source, text_tokens=0)
    data.attach(tiny[1])
    with pytest.raises(InputError, match="no questions"):
        data.setup()
