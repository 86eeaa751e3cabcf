"""`python -m casp_pl data`: the figures are those of the batches, the sheet can be looked at, damage is told."""

import json
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
    assert "Sample train.json#2/2: 1 <image> marks in the text, but 2 images" in capsys.readouterr().err


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
