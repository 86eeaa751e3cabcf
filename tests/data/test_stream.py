"""Streams: what is skipped is counted, and a stopped pass goes on with the very next row."""

import json
from itertools import islice

import pytest
from PIL import Image

from casp_pl.data import CalibrationData, EvaluationData, LlavaJson, Mixture, Sample, SampleStream, Skipped, TextFiles
from casp_pl.data.sources import DataSource
from casp_pl.data.sources.json_rows import json_rows
from casp_pl.errors import ConfigError, InputError


class Numbers(DataSource):
    """Rows 0 to count - 1, every `gap`-th of them unusable; remembers how far it was read."""

    def __init__(self, name, count, gap=10**9):
        self.name, self.count, self.gap, self.read = name, count, gap, 0

    def rows(self, split, start=0):
        for number in range(start, self.count):
            self.read = number + 1
            name = f"{self.name}{number}"
            yield Skipped(name, "gap") if number % self.gap == self.gap - 1 else Sample(id=name, text="x")


@pytest.fixture
def llava(llava_folder):
    """40 conversations about 30 images, number 7 damaged and number 11 missing."""
    images, write = llava_folder
    (images / "7.png").write_bytes((images / "7.png").read_bytes()[:50])
    (images / "11.png").unlink()
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    rows = [{"id": str(number), "image": f"{number % 30}.png", "conversations": talk} for number in range(60)]
    return LlavaJson(path=write(rows), image_folder=images)


def names(samples):
    return [sample.id for sample in samples]


@pytest.mark.parametrize("after", [1, 2, 7, 20])
def test_a_stopped_pass_goes_on_with_the_next_row(llava, after):
    other = Numbers("n", 100, gap=30)
    mixture = Mixture(sources=[llava, other], weights=[2, 1])
    whole = SampleStream(mixture, limit=80)
    expected = names(whole)
    stopped = SampleStream(mixture, limit=80)
    seen = names(islice(stopped, after))
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = SampleStream(Mixture(sources=[llava, Numbers("n", 100, gap=30)], weights=[2, 1]), limit=80)
    resumed.load_state_dict(state)
    assert seen + names(resumed) == expected
    assert resumed.skipped == whole.skipped
    assert resumed.position == whole.position == 80
    assert names(resumed) == expected, "the next pass is a whole one again"


def test_what_is_skipped_is_told_with_path_and_reason(llava):
    stream = SampleStream(llava, limit=30)
    with pytest.raises(InputError, match=r"2 of 30 samples cannot be used") as caught:
        list(stream)
    assert caught.value.exit_code == 3
    damaged, missing = stream.skipped
    assert (damaged.id, missing.id) == ("train.json#7/7", "train.json#11/11")
    assert "7.png: cannot be decoded" in damaged.reason
    assert "11.png: no such file" in missing.reason
    assert len(list(SampleStream(llava, limit=30, check_images=False))) == 30


def test_up_to_five_percent_may_be_skipped():
    stream = SampleStream(Numbers("n", 40, gap=20))
    assert len(list(stream)) == 38
    assert names(stream.skipped) == ["n19", "n39"]
    with pytest.raises(InputError, match="2 of 39 samples"):
        list(SampleStream(Numbers("n", 39, gap=19)))


def test_other_data_is_not_resumed():
    stream = SampleStream(Numbers("n", 40))
    list(islice(stream, 5))
    state = stream.state_dict()
    with pytest.raises(ConfigError, match="row 4 was n4 and is m4 now"):
        SampleStream(Numbers("m", 40)).load_state_dict(state)
    with pytest.raises(ConfigError, match="row 4 was n4 and there is none now"):
        SampleStream(Numbers("n", 3)).load_state_dict(state)


def test_a_stream_is_read_only_as_far_as_it_is_asked_for():
    source = Numbers("n", 10**9)
    assert len(list(SampleStream(source, limit=12))) == 12
    assert source.read == 12


def test_texts_are_read_only_as_far_as_windows_need_them(tiny):
    source = Numbers("n", 10**9)
    calibration = CalibrationData(text_source=source, samples=4, text_ratio=1, text_length=30)
    calibration.attach(tiny[1])
    assert calibration.counts["text_samples"] == 3
    assert 8 * 4 * 30 / 3 <= source.read < 8 * 4 * 30 / 3 + 10, "x and two line ends are three bytes"
    evaluation = EvaluationData(text_source=source, questions=0, text_tokens=90, window=30)
    evaluation.attach(tiny[1])
    assert evaluation.counts["text_tokens"] == 90
    assert source.read == 30


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [5, 1], [0.2, 0.3, 0.5], [1, 1, 1, 7]])
def test_every_beginning_of_a_mixture_has_the_weights(weights):
    mixture = Mixture(sources=[Numbers(f"s{n}-", 10**6) for n in range(len(weights))], weights=weights)
    counts = [0] * len(weights)
    for total, sample in enumerate(islice(mixture.rows("train"), 500), start=1):
        counts[int(sample.id.split("/")[0])] += 1
        assert all(abs(count - total * w / sum(weights)) <= 1 for count, w in zip(counts, weights, strict=True))


@pytest.mark.parametrize("start", [0, 1, 5, 17, 29, 30])
def test_a_mixture_starts_anywhere_and_ends_with_its_first_source(start):
    def rows(at):
        return Mixture(sources=[Numbers("a", 20), Numbers("b", 99)], weights=[2, 1]).rows("train", at)

    whole = names(rows(0))
    assert names(rows(start)) == whole[start:]
    assert [name for name in whole if name.startswith("0/")] == [f"0/a{n}" for n in range(20)]
    assert len(whole) == 30


@pytest.mark.parametrize("weights", [[1.0], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_impossible_mixtures(weights):
    with pytest.raises(ConfigError, match="Mixture"):
        Mixture(sources=[Numbers("a", 1), Numbers("b", 1)], weights=weights)
    with pytest.raises(ConfigError, match="0 sources"):
        Mixture(sources=[])


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
def test_json_lists_in_pieces_are_what_json_says(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("casp_pl.data.sources.json_rows._CHUNK", chunk)
    rows = [{"a": [1, 2, {"b": "]},\u00e9 \\"}]}, 12345, "te,xt", None, True, -1.5e3, [], {}]
    for name, text in (("a", json.dumps(rows)), ("b", json.dumps(rows, indent=3, ensure_ascii=False)), ("c", " [ ] ")):
        path = tmp_path / f"{name}.json"
        path.write_text(text, encoding="utf-8")
        expected = json.loads(text)
        assert [row.value for row in json_rows(path)] == expected
        assert [(row.place, row.value) for row in json_rows(path, 3)] == [
            (f"{path}, row {number}", value) for number, value in enumerate(expected)
        ][3:]


@pytest.mark.parametrize("text", ["", "{}", "[1, 2", "[1 2]", '[{"a": 1}', "[1, ]", "[}", '["a', "[1] 2"])
def test_what_is_no_json_list_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"Cannot read .*a\.json"):
        list(json_rows(path))


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n{"text": " "}\n{"text": "three"}\n')
    assert [sample.text for sample in TextFiles(path=path).load("train")] == ["one", "two", "three"]
    assert [row.text for row in TextFiles(path=tmp_path).rows("train", 2)] == ["three"]
    assert next(json_rows(path, 1)) == (f"{path}, line 3", {"text": "two"}, "")
    with pytest.raises(InputError, match=r"#0: .*, line 1: no text in the column 'body', there is \['text'\]"):
        list(SampleStream(TextFiles(path=path, column="body")))
    path.write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(InputError, match=r"a\.jsonl#1: .*a\.jsonl, line 2: not JSON"):
        list(SampleStream(TextFiles(path=path)))


@pytest.mark.parametrize("words", [5, 500])
def test_texts_that_are_read_in_part_are_held_to_the_same_tolerance(tiny, tmp_path, words):
    """A single broken row of few that are needed is none of a hundred."""

    def counts(broken, data):
        lines = [json.dumps({"text": "word " * words} if n >= broken else n) for n in range(400)]
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        data.attach(tiny[1])
        return data.counts

    source = TextFiles(path=tmp_path / "a.jsonl", test_path=tmp_path / "a.jsonl")
    for make in (
        lambda: CalibrationData(text_source=source, samples=8, text_ratio=1, text_length=24, holdout=0),
        lambda: EvaluationData(text_source=source, questions=0, text_tokens=1600, window=32),
    ):
        (skipped,) = counts(1, make())["skipped"]
        assert skipped["reason"].endswith("a.jsonl, line 1: no text in the column 'text', there is int")
        with pytest.raises(InputError, match=r"samples cannot be used \(more than 5%\)\nThe first is .*\nThe next is"):
            counts(20, make())


def test_conversations_in_json_lines(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    row = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>Hi"}, {"from": "gpt", "value": "Ho"}]}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
    source = LlavaJson(path=tmp_path / "a.jsonl", image_folder=tmp_path)
    assert names(source.rows("train")) == ["a.jsonl#0", "a.jsonl#1"]
    assert names(source.rows("train", 1)) == ["a.jsonl#1"]
