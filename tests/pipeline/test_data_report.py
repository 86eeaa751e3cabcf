"""`python -m casp_pl data`: the figures are those of the samples, the sheet can be looked at, damage is told."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from casp_pl.cli import main
from casp_pl.data.contact_sheet import contact_sheet

TURNS = [{"from": "human", "value": "<image>\nWhat colour is it?"}, {"from": "gpt", "value": "Red."}]


@pytest.fixture
def write(tmp_path: Path):
    """Writes so many images, the first of them broken, and gives the options of a run on them."""

    def make(count: int, broken: int) -> list[str]:
        rows = []
        for number in range(count):
            Image.new("RGB", (20, 14), (255, number, 0)).save(tmp_path / f"{number}.png")
            rows.append({"id": str(number), "image": f"{number}.png", "conversations": TURNS})
        for number in range(broken):
            (tmp_path / f"{number}.png").write_bytes(b"broken")
        (tmp_path / "train.json").write_text(json.dumps(rows))
        source = ["--data.source", "LlavaJson", "--data.source.path", str(tmp_path / "train.json")]
        source += ["--data.source.image_folder", str(tmp_path), "--data.samples", str(count), "--data.text_ratio", "0"]
        source += ["--data.fine_tuning_samples", str(count), "--run_dir", str(tmp_path / "runs" / "here")]
        return [*source, "--data.questions_per_image", "1"]

    return make


WHOLE = "<|im_start|>user\n\nWhat colour is it?<|im_end|>\n<|im_start|>assistant\nRed.<|im_end|>\n"
TEXT_TOKENS = len(re.sub(r"<.im_\w+.>", "S", WHOLE))  # one a byte, one a special
COUNTED_TOKENS = len("Red.") + 1
IMAGE_TOKENS = 4 * 4  # 32 pixels in patches of 8


def table(printed: str, first: str) -> dict[str, list[tuple[int, float]]]:
    """Rows of the table with that corner: of every cell the count and the share, which may be missing."""
    lines = iter(printed.splitlines())
    next(line for line in lines if line.startswith(first))
    found = {}
    for line in lines:
        name, *cells = re.split(r"\s{2,}", line.strip())
        if len(cells) > 1:
            found[name] = [tuple(map(float, re.findall(r"[\d.]+", cell.replace(",", "")))) for cell in cells]
        elif name and set(name) - set("\u2500-"):
            break
    return found


def test_the_figures_are_those_of_the_samples(write, recipe: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["data", *recipe, *write(40, 2), "--data.holdout", "0.25"]) == 0
    rows = table(capsys.readouterr().out, "part")
    assert [rows[part][0] for part in ("calibration", "held back", "fine-tuning alone")] == [(28,), (10,), (0,)]
    for part, count in (("calibration", 28), ("held back", 10)):
        asked = TEXT_TOKENS - COUNTED_TOKENS
        each = [
            (tokens, 100 * tokens / (IMAGE_TOKENS + TEXT_TOKENS)) for tokens in (IMAGE_TOKENS, asked, COUNTED_TOKENS)
        ]
        assert rows[part][:3] == [(count,)] * 3
        for (tokens, share), (expected, percent) in zip(rows[part][3:], each, strict=True):
            assert tokens == count * expected
            assert share == pytest.approx(percent, abs=0.051)


def test_a_mixture_tells_what_each_source_gave(
    write, recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = write(32, 0)
    rows = json.loads((tmp_path / "train.json").read_text())
    rows[3]["conversations"] = [TURNS[0]]  # malformed: its place stays empty
    for row in rows[24:]:
        row["conversations"] = [TURNS[0], {"from": "gpt", "value": "Red, said the old man at last."}]
    sources = []
    for name, part in (("many", rows[:24]), ("few", rows[24:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
        settings = {"path": str(tmp_path / f"{name}.json"), "image_folder": str(tmp_path)}
        sources.append({"class_path": "casp_pl.data.LlavaJson", "init_args": settings})
    mixture = {"class_path": "casp_pl.data.Mixture", "init_args": {"sources": sources, "weights": [3, 1]}}
    (tmp_path / "mixture.json").write_text(json.dumps({"data": {"source": mixture}}))
    options = [
        *options[options.index("--data.text_ratio") :],
        "--data.samples",
        "31",
        "--data.fine_tuning_samples",
        "31",
    ]
    assert main(["data", *recipe, "--config", str(tmp_path / "mixture.json"), *options]) == 0
    printed = capsys.readouterr().out
    rows = table(printed, "source of the mixture")
    many, few = 23 * (IMAGE_TOKENS + TEXT_TOKENS), 8 * (IMAGE_TOKENS + TEXT_TOKENS + 26)
    assert [row[0] for row in rows.values()] == [(75.0,), (25.0,)]
    assert [row[1] for row in rows.values()] == [(23, 74.2), (8, 25.8)]
    assert [row[2][0] for row in rows.values()] == [many, few]
    assert rows["1 LlavaJson"][2][1] == pytest.approx(100 * few / (many + few), abs=0.051)
    assert "conversations are chosen from 32 rows" in printed
    assert "many.json, row 3: the turns are" in printed


def test_what_enters_is_told_and_shown(write, recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", *recipe, *write(40, 2)]) == 0
    printed = capsys.readouterr().out
    for words in (
        "calibration",
        "held back",
        "image tokens",
        "0.png: cannot be decoded",
        "skipped: 2 (2 x cannot be decoded)",
        "fingerprint",
    ):
        assert words in printed
    with Image.open(tmp_path / "runs" / "here.data.png") as sheet:
        red = (np.asarray(sheet.convert("RGB"))[..., :3] == (255, 20, 0)).all(-1).sum()
        assert sheet.format == "PNG"
    assert red == 20 * 14, "image 20, at its own size"
    assert not (tmp_path / "runs" / "here").exists()


def test_too_much_damage_ends_with_3_after_it_is_listed(
    write, recipe: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert main(["data", *recipe, *write(40, 3), "--out", str(tmp_path / "sheet.png")]) == 3
    captured = capsys.readouterr()
    assert "3 of 40 samples cannot be used" in captured.err
    assert len(captured.err.splitlines()) <= 3
    assert all(f"{number}.png: cannot be decoded" in captured.out for number in range(3))
    assert not (tmp_path / "sheet.png").exists()


def test_a_number_of_marks_that_is_not_that_of_the_images_ends_with_3(
    write, recipe: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    options = write(4, 0)
    rows = json.loads((tmp_path / "train.json").read_text())
    rows[2]["image"] = ["1.png", "2.png"]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert main(["data", *recipe, *options]) == 3
    place = tmp_path / "train.json"
    message = f"The first is train.json#2/2: {place}, row 2: 1 <image> marks in the text, but 2 images"
    assert message in capsys.readouterr().err


def test_text_alone_needs_no_sheet(recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "sheet.png"
    assert main(["data", *recipe, "--data.text_ratio", "1", "--out", str(out)]) == 0
    assert "skipped: nothing" in capsys.readouterr().out
    assert not out.exists()


def test_captions_may_hold_anything(tmp_path: Path):
    Image.new("RGB", (300, 40), "blue").save(tmp_path / "a.png")
    entries = [(tmp_path / "a.png", caption) for caption in ("", "\u4f60\u597d \U0001f600 $x$ \x00", "long " * 99)]
    (tmp_path / "sheet.png").write_bytes(contact_sheet(entries))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 3 * 176
