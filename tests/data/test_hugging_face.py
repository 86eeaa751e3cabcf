"""Data sets that the package datasets itself has written, streamed and not; its own decoding is the oracle."""

import json

import numpy as np
import pytest
from PIL import Image

from casp_pl.data import HuggingFaceConversations, HuggingFaceText, SampleStream, Skipped, Turn, load_image
from casp_pl.errors import ConfigError, InputError

datasets = pytest.importorskip("datasets")

COUNT = 7
LANGUAGE = {"question": "q", "answer": "a", "image": "picture"}


def picture(number):
    return Image.new("RGB", (6, 5), (30 * number, 100, 200))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def rows():
    columns = {
        "q": [f"what is {number}?" for number in range(COUNT)],
        "a": [f"it is {number}" for number in range(COUNT)],
        "picture": [picture(number) for number in range(COUNT)],
        "unused": [0] * COUNT,
    }
    return datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())


@pytest.fixture(params=["saved", "parquet", "arrow"])
def folder(request, rows, tmp_path):
    """The data set in one of the forms that the library writes."""
    path = tmp_path / request.param
    path.mkdir()
    if request.param == "saved":
        datasets.DatasetDict({"train": rows}).save_to_disk(path)
    elif request.param == "parquet":
        rows.to_parquet(path / "train-00000-of-00001.parquet")
    else:
        rows.save_to_disk(tmp_path / "arrow_source")
        (tmp_path / "arrow_source" / "data-00000-of-00001.arrow").rename(path / "train.arrow")
    return path


@pytest.mark.parametrize("streaming", [True, False])
def test_questions_with_images(folder, rows, streaming):
    source = HuggingFaceConversations(name=str(folder), streaming=streaming, **LANGUAGE)
    samples = source.load("train")
    assert [sample.turns for sample in samples] == [(Turn(r["q"], r["a"]),) for r in rows]
    for sample, row in zip(samples, rows, strict=True):
        (image,) = sample.images
        assert (np.asarray(load_image(image)) == np.asarray(row["picture"])).all()
    assert [row.id for row in source.rows("train", 5)] == [sample.id for sample in samples[5:]]


@pytest.mark.parametrize("after", [1, 4, 6])
def test_streaming_resumes_in_the_middle(folder, after):
    def stream():
        return SampleStream(HuggingFaceConversations(name=str(folder), **LANGUAGE))

    stopped = stream()
    iterator = iter(stopped)
    seen = [next(iterator).turns for _ in range(after)]
    resumed = stream()
    resumed.load_state_dict(stopped.state_dict())
    assert seen + [sample.turns for sample in resumed] == [sample.turns for sample in stream()]


def test_image_folder_with_metadata(tmp_path):
    folder = tmp_path / "folder" / "train"
    folder.mkdir(parents=True)
    lines = []
    for number in range(3):
        picture(number).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "q": f"what {number}?", "a": [f"{number}", "none"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    source = HuggingFaceConversations(name=str(folder.parent), question="q", answer="a")
    samples = source.load("train")
    assert [sample.turns[0].answer for sample in samples] == ["0", "1", "2"]
    assert [np.asarray(load_image(sample.images[0]))[0, 0, 0] for sample in samples] == [0, 30, 60]


def test_conversations_with_several_images(tmp_path):
    turns = [
        [{"from": "human", "value": "<image>\nand <image>\n?"}, {"from": "gpt", "value": "both"}],
        [{"from": "human", "value": "none?"}, {"from": "gpt", "value": "none"}],
    ]
    columns = {"talk": turns, "images": [[picture(1), picture(2)], []]}
    table = datasets.Dataset.from_dict(columns).cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(tmp_path / "train.parquet")
    source = HuggingFaceConversations(name=str(tmp_path), conversations="talk", image="images")
    first, second = source.load("train")
    assert first.turns[0].question == "<image>\nand <image>\n?"
    assert [np.asarray(load_image(image))[0, 0, 0] for image in first.images] == [30, 60]
    assert second.images == ()


def test_conversations_without_an_image_among_others(tmp_path):
    ask = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "that"}]
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    columns = {"talk": [ask, talk, ask], "image": [picture(1), None, None]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "train.parquet")
    rows = list(HuggingFaceConversations(name=str(tmp_path), conversations="talk").rows("train"))
    assert [len(rows[0].images), rows[1].images, rows[1].turns] == [1, (), (Turn("Hi", "Ho"),)]
    assert isinstance(rows[2], Skipped)


def test_the_same_image_in_two_rows_is_one_image(tmp_path):
    columns = {"q": ["a?", "b?", "c?"], "a": ["a"] * 3, "picture": [picture(1), picture(2), picture(1)]}
    table = datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())
    table.to_parquet(tmp_path / "train.parquet")
    first, second, third = HuggingFaceConversations(name=str(tmp_path), **LANGUAGE).load("train")
    assert first.images == third.images != second.images


def test_rows_without_image_or_answer_and_broken_images_are_skipped(tmp_path):
    good = {"bytes": (tmp_path / "good.png"), "path": None}
    picture(1).save(good["bytes"])
    good["bytes"] = good["bytes"].read_bytes()
    broken = {"bytes": good["bytes"][:40], "path": None}
    columns = {
        "q": [f"{n}?" for n in range(80)],
        "a": [None, *(f"{n}" for n in range(1, 80))],
        "picture": [good, None, broken, {"bytes": b"", "path": None}, *([good] * 76)],
    }
    features = datasets.Features({"q": datasets.Value("string"), "a": datasets.Value("string")})
    features["picture"] = datasets.Image(decode=False)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    stream = SampleStream(HuggingFaceConversations(name=str(tmp_path), **LANGUAGE))
    assert len(list(stream)) == 76
    reasons = [entry.reason for entry in stream.skipped]
    assert "no text in the columns 'q' and 'a'" in reasons[0]
    assert "no image in the column 'picture'" in reasons[1]
    assert "cannot be decoded" in reasons[2]
    assert "empty file" in reasons[3]


def test_marks_must_match_the_images(tmp_path, rows):
    rows = rows.map(lambda row, number: {"q": row["q"] + "<image>" * (2 * (number == 3))}, with_indices=True)
    rows.to_parquet(tmp_path / "train.parquet")
    skipped = [
        row for row in HuggingFaceConversations(name=str(tmp_path), **LANGUAGE).rows("train") if row.id[-1] == "3"
    ]
    assert skipped == [Skipped(f"{tmp_path}/train/3", "2 <image> marks in the text, but 1 images")]


@pytest.mark.parametrize("streaming", [True, False])
def test_texts_are_streamed_or_read(tmp_path, streaming):
    table = datasets.Dataset.from_dict({"body": ["one", "", "two", None, "three"]})
    table.to_json(tmp_path / "train.jsonl")
    source = HuggingFaceText(name=str(tmp_path), column="body", streaming=streaming)
    assert [sample.text for sample in source.load("train")] == ["one", "two", "three"]
    assert [row.text for row in source.rows("train", 1)] == ["two", "three"]


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(InputError, match="no column 'body'"):
        HuggingFaceConversations(name=str(folder), question="body", answer="a", image=None).load("train")
    with pytest.raises(InputError, match="split 'validation'"):
        HuggingFaceConversations(name=str(folder), train_split="validation", **LANGUAGE).load("train")
    with pytest.raises(ConfigError, match="conversations"):
        HuggingFaceConversations(name=str(folder), question="q")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.parquet").write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(InputError, match="cannot be read"):
        HuggingFaceConversations(name=str(tmp_path / "bad"), **LANGUAGE).load("train")


@pytest.mark.parametrize("streaming", [True, False])
def test_images_of_rows_on_disk_are_read_again_and_not_held(folder, streaming):
    source = HuggingFaceConversations(name=str(folder), streaming=streaming, **LANGUAGE)
    assert source.streams == (streaming and folder.name != "saved"), "what save_to_disk wrote is here already"
    samples = source.load("train")
    held = [sample.images[0].read for sample in samples]
    assert any(isinstance(part, bytes) for read in held for part in read.args) == source.streams
    for number, sample in enumerate(source.rows("train", 3), start=3):
        assert sample.images[0].stored() == samples[number].images[0].stored()
        assert (np.asarray(load_image(sample.images[0])) == np.asarray(picture(number))).all()


def test_images_in_lists_of_rows_on_disk_are_read_again(tmp_path):
    columns = {"talk": [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]]}
    columns["image"] = [[picture(1), picture(2)]]
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.List(datasets.Image()))
    table.save_to_disk(tmp_path / "saved")
    (sample,) = HuggingFaceConversations(name=str(tmp_path / "saved"), conversations="talk").load("train")
    assert [np.asarray(load_image(image))[0, 0, 0] for image in sample.images] == [30, 60]
