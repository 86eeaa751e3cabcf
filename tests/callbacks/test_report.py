import io
import json
import math
import re
import struct
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image

from casp_pl.callbacks.environment import package_versions, peak_memory_bytes, source_commit
from casp_pl.callbacks.pictures import draw_pictures, png_bytes
from casp_pl.callbacks.report import (
    BlockFigures,
    CompressionReport,
    Example,
    ModuleFigures,
    StageRow,
    sparsity_by_modality,
)
from casp_pl.callbacks.report_files import read_report, write_report
from casp_pl.callbacks.report_markdown import report_markdown
from casp_pl.callbacks.run_details import RunDetails, loss_curves
from casp_pl.callbacks.tensorboard import log_report, log_stage
from casp_pl.errors import IntegrityError

PICTURES = ["stages", "bits", "proxy_loss", "attention_sparsity", "timings", "examples"]


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (7, 5), (255, 0, 0)).save(path)
    return str(path)


@pytest.fixture
def report(image):
    linear = "model.language_model.layers.{}.self_attn.{}"
    return CompressionReport(
        name="made_up",
        model="tiny",
        quantizer="aqlm",
        versions={"torch": "2.13.0"},
        wall_seconds=5999.0,
        peak_memory_bytes=1_234_567_890,
        stages=(
            StageRow(
                name="original", vqa_accuracy=0.9, vqa_interval=(0.875, 0.925), perplexity=12345.678, model_bytes=999
            ),
            StageRow(name="rtn", bits_per_weight_codes=2.0, bits_per_weight_total=2.25, kl=math.inf, questions=3),
            StageRow(
                name="end_to_end", bits_per_weight_codes=1.999, bits_per_weight_total=2.6, kl=0.01234, seconds=1.5
            ),
        ),
        modules=(
            ModuleFigures(name=linear.format(0, "q_proj"), block=0, shape=(24, 16), rank=8, bits=3, bits_total=2.5),
            ModuleFigures(name=linear.format(0, "v_proj"), block=0, shape=(8, 16), bits=2, relative_proxy_loss=0.0123),
            ModuleFigures(name=linear.format(3, "v_proj"), block=3, shape=(8, 16), bits=2, relative_proxy_loss=0.5),
        ),
        blocks=(
            BlockFigures(block=0, score=1.5, attention_sparsity=sparsity_by_modality([[0.5, math.nan], [0.25, 1.0]])),
            BlockFigures(block=3),
        ),
        data={"calibration": {"image_samples": 1234, "skipped": []}, "skipped": [{"id": "a", "reason": "b | c"}]},
        examples=(
            Example(question="what $x$ is it?", original="red", compressed="", reference="red", image=image),
            Example(question="gone", original="a", compressed="a", image=image + ".missing"),
            Example(question="words " * 50, original="b" * 200, compressed="\u4f60\ufffd\x00\U0001f600 $"),
        ),
    )


def png_size(data):
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_json_has_every_key_of_the_schema(report):
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))
    top = {"name", "model", "quantizer", "commit", "versions", "wall_seconds", "peak_memory_bytes", "stages", "modules"}
    stage = {"name", "bits_per_weight_codes", "bits_per_weight_total", "model_bytes", "vqa_accuracy"}
    stage |= {"vqa_accuracy_not_yes_no", "perplexity", "kl", "flip_rate", "seconds"}
    module = {"name", "shape", "rank", "bits", "bits_total", "relative_proxy_loss", "seconds"}
    assert top | {"data"} <= set(value)
    assert all(stage <= set(row) for row in value["stages"])
    assert all(module <= set(row) for row in value["modules"])
    assert value["commit"] is None
    assert value["stages"][0]["kl"] is None
    assert value["modules"][1]["rank"] is None
    assert value["modules"][0]["shape"] == [24, 16]


def test_what_is_not_finite_becomes_null_and_is_said(report, caplog):
    assert report.to_json()["stages"][1]["kl"] is None
    assert "stages.1.kl is inf" in caplog.text


def test_a_report_survives_its_files(report, tmp_path):
    names, figures = write_report(report, tmp_path, RunDetails())
    assert list(figures) == PICTURES
    written = [*(f"{name}.png" for name in PICTURES), "examples/0.png", "report.md", "report.html", "report.json"]
    assert names == written
    assert all((tmp_path / name).is_file() for name in names)
    again = read_report(tmp_path)
    assert again.to_json() == report.to_json()
    assert again.modules == report.modules
    assert again.blocks == report.blocks
    assert again.examples == report.examples
    assert again.stage("end_to_end") == report.stages[2]
    assert again.stage("quantized") is None


def test_what_an_earlier_version_did_not_write_has_its_default(report):
    value = report.to_json()
    for key in ("command", "machine", "planned_stages", "work_seconds"):
        del value[key]
    assert CompressionReport.from_json(value).to_json() == report.to_json()


@pytest.mark.parametrize("change", [{"kl_text": 0.1}, {"name": "drop"}])
def test_other_keys_are_refused(report, change):
    value = report.to_json()
    for key, item in change.items():
        value["stages"][0].pop(key) if item == "drop" else value["stages"][0].update({key: item})
    with pytest.raises(IntegrityError, match=f"stages: .*{next(iter(change))}"):
        CompressionReport.from_json(value)


def test_pictures_show_something(report):
    pictures = draw_pictures(report, RunDetails())
    assert list(pictures) == PICTURES
    for figure in pictures.values():
        data = png_bytes(figure)
        assert min(png_size(data)) > 300
        assert len(data) > 5000


def test_the_example_picture_holds_the_image(report):
    figure = draw_pictures(report, RunDetails())["examples"]
    with Image.open(io.BytesIO(png_bytes(figure))) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert (255, 0, 0) in colours


def test_the_same_report_gives_the_same_pixels(report):
    first, second = (draw_pictures(report, RunDetails())["proxy_loss"] for _ in range(2))
    assert png_bytes(first) == png_bytes(second)


def test_an_empty_report_has_no_pictures_but_a_text(tmp_path):
    empty = CompressionReport(name="empty", model="m", quantizer="q")
    assert write_report(empty, tmp_path, RunDetails()) == (["report.md", "report.html", "report.json"], {})
    assert "n/a" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_copies_of_images_stand_in_for_those_that_are_gone(report, tmp_path, image):
    write_report(report, tmp_path, RunDetails(), draw=False)
    first = (tmp_path / "report.html").read_text(encoding="utf-8")
    Path(image).unlink()
    write_report(report, tmp_path, RunDetails(), draw=False)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == first
    assert "data:image/png" in first
    assert read_report(tmp_path).examples[0].image == image, "report.json still says where it was"


def test_losses_of_a_run_that_went_on_begin_once(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    for steps in ([0, 1, 2], [0, 1, 2, 3]):
        with SummaryWriter(str(tmp_path), filename_suffix=str(len(steps))) as writer:
            for step in steps:
                writer.add_scalar("end_to_end/train_kl", step / len(steps), step)
                writer.add_scalar("score", 1.0, step)
    assert loss_curves(tmp_path) == {"end_to_end/train_kl": [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]}
    assert loss_curves(tmp_path / "none") == {}


def test_markdown_table(report):
    text = report_markdown(CompressionReport.from_json(report.to_json()), PICTURES)
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    assert len({len(row) for row in rows[:5]}) == 1
    assert rows[2] == ["original", "n/a", "999 B", "90.0", "87.5 - 92.5", "n/a", "12,345.68", "n/a", "n/a", "n/a"]
    assert rows[3][:2] == ["RTN", "2.000 / 2.250"]
    assert rows[4][7:] == ["0.0123", "n/a", "1.5 s"]
    assert "Wall time 100.0 min, peak memory 1.23 GB" in text
    assert "| calibration: image samples | 1,234 |" in text
    assert "| calibration: skipped | 0 |" in text
    assert '| skipped | 1: [{"id": "a", "reason": "b \\| c"}] |' in text
    assert "b \\| c" in text
    assert "![Example questions](examples.png)" in text
    assert text.isascii()


def test_sparsity_names_the_modalities():
    named = sparsity_by_modality([[0.1, 0.2], [math.nan, 0.4]])
    assert named == {"text to text": 0.1, "text to image": 0.2, "image to text": None, "image to image": 0.4}


def test_tensorboard_gets_every_figure(report, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "tb")) as writer:
        again = CompressionReport.from_json(report.to_json())
        log_report(writer, again, draw_pictures(again, RunDetails()))
        log_stage(writer, again.stages[2], 4)
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"images": 0}).Reload()
    losses = events.Scalars("relative_proxy_loss/v_proj")
    assert [(event.step, event.value) for event in losses] == [(0, pytest.approx(0.0123)), (3, 0.5)]
    assert [event.value for event in events.Scalars("rank/q_proj")] == [8]
    assert [event.value for event in events.Scalars("attention_sparsity/image_to_text")] == [0.25]
    assert [event.step for event in events.Scalars("stage/kl")] == [4]
    assert {tag.split("/")[1] for tag in events.Tags()["images"]} == set(PICTURES)


def test_environment():
    assert package_versions()["torch"] == version("torch")
    commit = source_commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel's own figure is read from /proc")
def test_peak_memory_is_the_kernels_high_water_mark():
    ballast = b"x" * 50_000_000
    peak = peak_memory_bytes()
    status = Path("/proc/self/status").read_text()
    assert peak == pytest.approx(1024 * int(re.search(r"VmHWM:\s+(\d+)", status).group(1)), rel=0.05)
    assert peak > len(ballast)
