from itertools import islice

import pytest
import torch

from casp_pl.data import CalibrationData, LlavaJson, TextFiles
from casp_pl.errors import ConfigError, InputError


@pytest.fixture
def source(llava_folder):
    """30 images with two conversations each."""
    images, write = llava_folder
    rows = [
        {
            "id": f"{number}-{question}",
            "image": f"{number}.png",
            "conversations": [
                {"from": "human", "value": "<image>\n" + "why? " * (1 + number % 7 + question)},
                {"from": "gpt", "value": "because " * (1 + question)},
            ],
        }
        for number in range(30)
        for question in range(2)
    ]
    return LlavaJson(path=write(rows), image_folder=images)


@pytest.fixture
def text_source(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(4):
        (tmp_path / "text" / f"{number}.txt").write_text(f"file {number}: " + "some plain words, " * 60)
    return TextFiles(path=tmp_path / "text")


@pytest.fixture
def make(tiny, source, text_source):
    def build(**settings):
        defaults = {"source": source, "text_source": text_source, "samples": 40, "text_length": 32, "batch_size": 4}
        data = CalibrationData(**(defaults | settings))
        data.attach(tiny[1])
        return data

    return build


def sample_ids(loader):
    return [sample_id for batch in loader for sample_id in batch["sample_ids"]]


def image_of(sample_id):
    return sample_id.split("/")[-1].split("-")[0]


def test_counts_are_what_the_batches_hold(make, tiny):
    data = make()
    batches = list(data.calibration_dataloader())
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    image_tokens = sum(int((batch["input_ids"] == tiny[1].image_token_id).sum()) for batch in batches)
    images = sum(len(batch.get("pixel_values", ())) for batch in batches)
    counts = data.counts
    assert counts["image_samples"] == images
    assert counts["image_tokens"] == image_tokens == 16 * images
    assert counts["text_tokens"] == real - image_tokens
    assert counts["samples"] == counts["image_samples"] + counts["text_samples"] == len(sample_ids(batches))
    assert counts["samples"] + counts["held_back_samples"] == 40
    assert counts["skipped"] == []


def test_split_ratio_and_spread(make):
    data = make(text_ratio=0.25, holdout=0.2)
    kept, held_back = sample_ids(data.calibration_dataloader()), sample_ids(data.val_dataloader())
    assert len(set(kept + held_back)) == 40
    texts = [name for name in kept + held_back if name.startswith("text/")]
    assert len(texts) == 10
    images = {split: {image_of(n) for n in names if "-" in n} for split, names in (("k", kept), ("h", held_back))}
    assert not images["k"] & images["h"]
    assert len(images["k"] | images["h"]) == 30  # 30 conversations: one of every image
    assert sum(name.startswith("text/") for name in held_back) == 2


def test_second_questions_only_after_every_image_had_one(make):
    data = make(samples=45, text_ratio=0, holdout=0)
    names = sample_ids(data.calibration_dataloader())
    images = [image_of(name) for name in names]
    assert (len(names), len(set(images))) == (45, 30)
    assert list(data.val_dataloader()) == []


def test_fixed_order_has_little_padding(make):
    data = make()
    batches = list(data.calibration_dataloader())
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    texts = torch.tensor([name.startswith("text/") for name in sample_ids(batches)])
    assert torch.equal(lengths[~texts], lengths[~texts].sort().values)
    assert sample_ids(batches) == sample_ids(make().calibration_dataloader())


def test_training_sees_everything_in_another_order(make):
    data = make()
    fixed, trained = sample_ids(data.calibration_dataloader()), sample_ids(data.train_dataloader())
    assert sorted(fixed) == sorted(trained)
    assert fixed != trained
    assert trained == sample_ids(make().train_dataloader())


def test_the_seed_decides(make):
    assert make().fingerprint == make().fingerprint
    assert make().fingerprint != make(seed=1).fingerprint


def test_text_alone_and_conversations_alone(make):
    assert make(text_ratio=1).counts["image_samples"] == 0
    assert make(text_ratio=0).counts["text_samples"] == 0


def test_broken_images_are_skipped_and_counted(make, llava_folder):
    (llava_folder[0] / "3.png").write_bytes(b"broken")
    data = make(samples=60, text_ratio=0)
    assert [entry["id"].split("/")[-1][:2] for entry in data.counts["skipped"]] == ["3-", "3-"]
    assert all("3.png" in entry["reason"] for entry in data.counts["skipped"])
    assert data.counts["samples"] + data.counts["held_back_samples"] == 58


def test_too_many_broken_images_end_the_run(make, llava_folder):
    for number in (3, 4, 5):
        (llava_folder[0] / f"{number}.png").unlink()
    with pytest.raises(InputError, match="6 of 60 samples cannot be used") as caught:
        make(samples=60, text_ratio=0).setup()
    assert "no such file" in str(caught.value)


def test_too_long_conversations_are_cut_or_skipped(make):
    with pytest.raises(InputError, match="no answer within max_length = 40"):
        make(max_length=40, text_ratio=0).setup()

    def longest_of(data):
        return max(int(batch["attention_mask"].sum(1).max()) for batch in data.calibration_dataloader())

    longest = longest_of(make())
    data = make(max_length=longest - 5)
    assert longest_of(data) == longest - 5
    assert data.counts["skipped"] == []


def test_batches_come_in_few_widths(make):
    batches = [*make().calibration_dataloader(), *islice(make().train_dataloader(), 4)]
    assert {batch["input_ids"].shape[1] % 16 for batch in batches} == {0}
    for batch in batches:
        assert batch["input_ids"].shape[1] - int(batch["attention_mask"].sum(1).max()) < 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 100, "text_ratio": 0}, "100 image-text samples are wanted, the source has 60"),
        ({"samples": 400, "text_ratio": 0.9}, "360 text windows of 32 tokens are wanted, the text source has"),
    ],
)
def test_too_little_data_is_an_error_with_both_numbers(make, settings, message):
    with pytest.raises(InputError, match=message):
        make(**settings).setup()


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"samples": 0}, "samples"), ({"text_ratio": 1.5}, "text_ratio"), ({"holdout": 1.0}, "holdout"),
     ({"questions_per_image": 0}, "questions_per_image"), ({"fine_tuning_samples": 9}, "fine_tuning_samples"),
     ({"batch_size": 0}, "batch_size"), ({"text_length": 1}, "text_length")],
)  # fmt: skip
def test_impossible_settings(settings, key):
    with pytest.raises(ConfigError, match=f"data.{key}"):
        CalibrationData(**settings)


def test_the_default_is_the_embedded_data(tiny):
    data = CalibrationData(samples=8, text_ratio=0.5, text_length=64, batch_size=3)
    data.attach(tiny[1])
    names = sample_ids(data.calibration_dataloader()) + sample_ids(data.val_dataloader())
    assert sum(name.startswith("easy-vqa/train/") for name in names) == 4
    assert sum(name.startswith("text/") for name in names) == 4


def test_a_text_model_says_how_to_go_on(tiny):
    data = CalibrationData(samples=8)
    data.attach(tiny[1].tokenizer)
    with pytest.raises(InputError, match="text_ratio to 1"):
        data.setup()
