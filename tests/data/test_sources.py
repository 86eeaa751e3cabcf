import json
from collections import Counter

import pytest

from casp_pl.data import (
    CalibrationData,
    EasyVQA,
    HuggingFaceText,
    LlavaJson,
    PydocProse,
    Sample,
    SampleStream,
    TextFiles,
    Turn,
)
from casp_pl.data.sources.pydoc_prose import prose_paragraphs
from casp_pl.errors import ConfigError, InputError


def talk(*texts, image=None, name="a"):
    roles = ("human", "gpt")
    conversations = [{"from": roles[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"id": name, "conversations": conversations} | ({} if image is None else {"image": image})


@pytest.mark.parametrize(("split", "questions", "images"), [("train", 38_575, 4_000), ("test", 9_673, 1_000)])
def test_easy_vqa_has_the_published_size(split, questions, images):
    samples = EasyVQA().load(split)
    assert len(samples) == questions
    assert len({sample.id for sample in samples}) == questions
    assert len({sample.image for sample in samples}) == images
    assert len({sample.turns[0].answer for sample in samples}) == 13
    assert samples[0].image.is_file()


def test_easy_vqa_missing_names_the_command(monkeypatch):
    monkeypatch.setattr("casp_pl.data.sources.easy_vqa.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install easy-vqa"):
        EasyVQA().load("train")


def test_a_sample_is_a_conversation_or_a_text():
    with pytest.raises(ValueError, match="either turns or text"):
        Sample(id="empty")
    with pytest.raises(ValueError, match="either turns or text"):
        Sample(id="both", turns=(Turn("q", "a"),), text="b")


def test_llava_json_reads_turns_and_strips_the_mark(llava_folder):
    images, write = llava_folder
    path = write([talk("<image>\nWhat?", "A bus.", "Colour?", "Red.", image="3.png"), talk("Hi", "Hello", name="b")])
    first, second = LlavaJson(path=path, image_folder=images).load("train")
    assert first.turns == (Turn("What?", "A bus."), Turn("Colour?", "Red."))
    assert first.image == images / "3.png"
    assert second.turns == (Turn("Hi", "Hello"),)
    assert second.image is None


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (talk("What?", "A bus.", image="0.png", name="x7"), "x7: 0 <image> marks in the text, but 1 images"),
        (talk("<image> What?", "A bus.", name="x7"), "x7: 1 <image> marks in the text, but 0 images"),
        (talk("<image><image> What?", "A bus.", image="0.png", name="x7"), "x7: 2 <image> marks"),
        (
            talk("<image>", "A bus.", image=["0.png", "1.png"], name="x7"),
            "x7: 1 <image> marks in the text, but 2 images",
        ),
        (talk("Hi", "<image>", image="0.png", name="x7"), "x7: an <image> mark belongs in a question"),
        (talk("Hi", "Hello", "Bye", name="x7"), "x7: the turns are"),
        ({"id": "x7"}, "x7: not a LLaVA conversation"),
        ({"id": "x7", "conversations": [{"from": "human"}, {"from": "gpt"}]}, "x7: not a LLaVA conversation"),
        (["x7"], "#0: not a LLaVA conversation"),
        (talk("Hi \ud83d", "Hello", name="x7"), "x7: one half of a surrogate pair in the text (\\ud83d)"),
        (talk("Hi", "Hello", "\udc4d", "Bye", name="x7"), "x7: one half of a surrogate pair in the text (\\udc4d)"),
        (talk("<image>", "A bus.", image="\ud83d.png", name="x7"), "x7: one half of a surrogate pair"),
    ],
)
def test_llava_json_names_the_bad_sample(llava_folder, row, message, ending):
    images, write = llava_folder
    path = write([talk("Hi", "Ho"), row])
    if ending == "jsonl":
        path = path.with_suffix(".jsonl")
        path.write_text(f"{json.dumps(talk('Hi', 'Ho'))}\n\n{json.dumps(row)}\n")
    source = LlavaJson(path=path, image_folder=images)
    good, bad = source.rows("train")
    name, reason = message.split(": ", 1)
    assert bad.id == f"{path.name}#1" + ("/x7" if name == "x7" else "")
    assert bad.reason.startswith(f"{path}, {'line 3' if ending == 'jsonl' else 'row 1'}: {reason}")
    with pytest.raises(InputError, match="1 of 2 samples cannot be used") as caught:
        list(SampleStream(source))
    assert f"The first is {bad.id}: {bad.reason}" in str(caught.value)
    assert str(caught.value).count("\n") < 3
    assert source.load("train") == [good]


@pytest.mark.parametrize("image", ["../0.png", "/0.png"])
def test_an_image_outside_its_folder_ends_the_run(llava_folder, image):
    images, write = llava_folder
    with pytest.raises(InputError, match=f"x7: the image {image} lies outside"):
        LlavaJson(path=write([talk("<image>", "A bus.", image=image, name="x7")]), image_folder=images).load("train")


def test_malformed_rows_within_the_tolerance_are_skipped_and_told(tiny, llava_folder):
    images, write = llava_folder
    rows = [talk("<image>Hm?", f"{number}", image=f"{number}.png", name=f"{number}") for number in range(30)] * 2
    rows[11], rows[40] = {"id": 4}, talk("<image>Hm?", "Ho", "Hm?", image="1.png")
    path = write(rows).with_suffix(".jsonl")
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([*lines[:50], '{"id": ', *lines[51:]]))
    data = CalibrationData(source=LlavaJson(path=path, image_folder=images), samples=30, text_ratio=0)
    data.attach(tiny[1])
    assert [entry["reason"].split(": ")[0] for entry in data.counts["skipped"]] == [
        f"{path}, line {number}" for number in (12, 41, 51)
    ]
    assert data.counts["samples"] + data.counts["held_back_samples"] == 30


def test_whole_surrogate_pairs_are_text(llava_folder):
    images, write = llava_folder
    path = write([talk("Hi \U0001f44d", "Hello", name="\ud83d")])
    assert "\\ud83d\\udc4d" in path.read_text(), "a pair in the file"
    (sample,) = LlavaJson(path=path, image_folder=images).load("train")
    assert sample.turns == (Turn("Hi \U0001f44d", "Hello"),)
    assert sample.id == "train.json#0/\\ud83d", "as JSON writes it, so that it can be printed and drawn"


def test_half_a_surrogate_pair_in_a_line_of_text_is_skipped(tiny, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"line {number}"}) for number in range(40)]
    lines[7] = json.dumps({"text": "a broken \ud83d thumb"})
    path.write_text("\n".join(lines))
    data = CalibrationData(
        text_source=TextFiles(path=path), samples=2, fine_tuning_samples=None, text_ratio=1, text_length=16
    )
    data.attach(tiny[1])
    data.setup()
    reason = f"{path}, line 8: one half of a surrogate pair in the text (\\ud83d)"
    assert data.counts["skipped"] == [{"id": f"{path}#7", "reason": reason}]


def test_llava_json_bad_files(llava_folder, tmp_path):
    images, write = llava_folder
    (tmp_path / "broken.json").write_text("[{]")
    with pytest.raises(InputError, match="broken.json"):
        LlavaJson(path=tmp_path / "broken.json", image_folder=images).load("train")
    with pytest.raises(InputError, match="absent.json"):
        LlavaJson(path=tmp_path / "absent.json", image_folder=images).load("train")
    with pytest.raises(InputError, match="not a list"):
        LlavaJson(path=write({}), image_folder=images).load("train")
    with pytest.raises(InputError, match="nowhere"):
        LlavaJson(path=write([]), image_folder=tmp_path / "nowhere").load("train")
    with pytest.raises(ConfigError, match="test_path"):
        LlavaJson(path=write([]), image_folder=images).load("test")


def test_prose_is_running_text_only():
    text = """The "with" statement
********************

   with_stmt ::= "with" with_item ("," with_item)* ":"

* The "with" statement is used to wrap the execution of a block with
  methods that are defined by a context manager, as it is said here.

   with open(name) as file: read(file); close(file); and_so_on(file, 1, 2, 3, 4)

+---------+--------------------------------------------------+
| x       | The item of the table that is not prose at all.  |
+---------+--------------------------------------------------+
"""
    assert prose_paragraphs(text) == [
        'The "with" statement is used to wrap the execution of a block with methods that are defined by a context '
        "manager, as it is said here."
    ]


def test_prose_parts_share_no_topic_and_no_paragraph():
    source = PydocProse()
    parts = {split: source.load(split) for split in ("train", "test")}
    paragraphs = {
        split: Counter(paragraph for sample in samples for paragraph in sample.text.split("\n\n"))
        for split, samples in parts.items()
    }
    assert not {sample.id for sample in parts["train"]} & {sample.id for sample in parts["test"]}
    assert not paragraphs["train"].keys() & paragraphs["test"].keys()
    assert max((paragraphs["train"] + paragraphs["test"]).values()) == 1
    size = {split: sum(map(len, counter)) for split, counter in paragraphs.items()}
    assert 0.15 < size["test"] / (size["train"] + size["test"]) <= 0.3
    assert parts == {split: PydocProse().load(split) for split in ("train", "test")}


def test_text_files(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("third", encoding="utf-8")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "note.md").write_text("not text")
    assert [sample.text for sample in TextFiles(path=tmp_path).load("train")] == ["second", "third"]
    held_out = TextFiles(path=tmp_path, test_path=tmp_path / "b.txt").load("test")
    assert [sample.text for sample in held_out] == ["second"]


def test_text_files_errors(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="latin.txt"):
        TextFiles(path=tmp_path).load("train")
    with pytest.raises(InputError, match="absent"):
        TextFiles(path=tmp_path / "absent").load("train")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no text"):
        TextFiles(path=tmp_path / "none").load("train")
    with pytest.raises(ConfigError, match="test_path"):
        TextFiles(path=tmp_path).load("test")


def test_hugging_face_text_from_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", " ", "two", "three"]})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "set")
    source = HuggingFaceText(name=str(tmp_path / "set"), limit=3)
    assert [sample.text for sample in source.load("train")] == ["one", "two"]
    with pytest.raises(InputError, match="split 'test'"):
        source.load("test")
    with pytest.raises(InputError, match="no column 'body'"):
        HuggingFaceText(name=str(tmp_path / "set"), column="body").load("train")


def test_an_unreachable_hub_is_told_at_once(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="cannot be reached") as caught:
        HuggingFaceText(name="some/dataset").load("train")
    assert "save_to_disk" in str(caught.value)
