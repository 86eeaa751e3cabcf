"""report.html: well-formed, escaped, complete in itself, and readable in a real browser."""

import base64
import dataclasses
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from casp_pl.callbacks.palette import DARK_SERIES, LIGHT_SERIES, ramp
from casp_pl.callbacks.report import (
    STAGE_NAMES,
    BlockFigures,
    CompressionReport,
    Example,
    ModuleFigures,
    StageRow,
    sparsity_by_modality,
)
from casp_pl.callbacks.report_html import report_html
from casp_pl.callbacks.report_html.elements import log_ticks, number_text, scale
from casp_pl.callbacks.run_details import RunDetails

EVIL = "<script>alert(1)</script> & \"quoted\" 'too' {{ 7 * 7 }} \u4f60\u597d\x00\x1b[31m\ud83d"
BLOCKS, HEADS = 32, 32
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    noise = torch.randint(0, 255, (300, 400, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(folder / "photo.png")
    Image.new("RGB", (64, 64), (255, 0, 0)).save(folder / "red.png")
    return folder


@pytest.fixture(scope="module")
def report(images):
    """As large as that of a 7B model."""
    modules = tuple(
        ModuleFigures(
            name=f"model.language_model.layers.{block}.self_attn.{linear}",
            block=block,
            shape=(4096, 4096),
            rank=512 + 32 * block if linear[0] in "qk" else None,
            bits=2 + block % 3,
            bits_total=2.2,
            relative_proxy_loss=10.0 ** (-1 - block % 4),
            seconds=3.0,
        )
        for block in range(BLOCKS)
        for linear in LINEARS
    )
    shares = [[[0.9, 0.95], [math.nan, 0.99]]] * BLOCKS
    return CompressionReport(
        name="a_rather_long_name_of_a_run_that_does_not_fit_on_a_phone_without_a_break",
        model=EVIL,
        quantizer="aqlm",
        versions={"torch": "2.13.0"},
        wall_seconds=854.0,
        peak_memory_bytes=5_330_000_000,
        stages=tuple(
            StageRow(name=name, vqa_accuracy=0.9, vqa_interval=(0.87, 0.93), perplexity=10.0**place, kl=0.1 * place,
                     model_bytes=10**9 // place, bits_per_weight_total=2.2, questions=1000, seconds=60.0)
            for place, name in enumerate(STAGE_NAMES, start=1)
        ),
        modules=modules,
        blocks=tuple(
            BlockFigures(block=block, score=1.0 + block, attention_sparsity=sparsity_by_modality(row))
            for block, row in enumerate(shares)
        ),
        data={"calibration": {"samples": 192, "skipped": [{"id": EVIL, "reason": "no such file" * 30}] * 3}},
        examples=(
            Example(question=EVIL, original=EVIL, compressed="", reference=EVIL, image=str(images / "photo.png")),
            Example(question="x" * 300, original="Red ", compressed="red", image=str(images / "red.png")),
            Example(question="gone", original="a", compressed="b", image=str(images / "none.png")),
            *(Example(question="q", original="a", compressed="a", image=str(images / "photo.png")) for _ in range(9)),
        ),
        command="python -m casp_pl fit --name " + EVIL,
        machine={"processor": EVIL},
        planned_stages=STAGE_NAMES,
        work_seconds={"calibration": 30.0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def details(report):
    values = torch.logspace(0, -3, 4096)
    spectra = {module.name: values * (1 + module.block) for module in report.modules if module.rank is not None}
    shares = torch.rand(BLOCKS, HEADS, 2, 2, generator=torch.Generator().manual_seed(0))
    shares[:, :, 1, 0] = math.nan
    steps = [(step, 1 / (1 + step)) for step in range(1000)]
    losses = {f"block_tuning/{kind}_{block:03d}": steps for kind in ("train", "held_back") for block in range(5, 32, 6)}
    losses |= {f"end_to_end/{name}": steps for name in ("train_kl", "held_back_kl", "held_back_answer_kl")}
    return RunDetails(spectra=spectra, head_sparsity=shares, losses=losses)


@pytest.fixture(scope="module")
def page(report, details):
    return report_html(report, details)


def tree(page):
    """The page as XML: every element closed, every attribute quoted, every & an entity."""
    return ElementTree.fromstring(page)


def texts(element):
    return " ".join("".join(element.itertext()).split())


def test_it_is_small_and_well_formed(page):
    assert len(page.encode()) < 2_000_000
    assert tree(page).tag == "html"
    ids = [element.get("id") for element in tree(page).iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    links = [element.get("href") for element in tree(page).iter("a")]
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert len(links) >= 10


def test_words_of_the_data_stay_words(page):
    assert not list(tree(page).iter("script"))
    said = texts(tree(page))
    assert said.count("<script>alert(1)</script>") >= 6
    assert "{{ 7 * 7 }}" in said
    assert "\u4f60\u597d" in said


def test_nothing_comes_from_elsewhere(page):
    class Addresses(HTMLParser):
        found = []

        def handle_starttag(self, tag, attributes):
            self.found += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "style")]

    parser = Addresses()
    parser.feed(page)
    assert len(parser.found) > 10
    assert all(address.startswith(("#", "data:")) for address in parser.found)
    assert "url(" not in page
    assert "@import" not in page


def test_images_are_inside_and_small(page, images):
    pictures = [element for element in tree(page).iter("img") if element.get("src").startswith("data:image/")]
    assert len(pictures) == 11
    assert all(element.get("alt") for element in pictures)
    kinds = [element.get("src").split(";")[0] for element in pictures[:2]]
    assert kinds == ["data:image/jpeg", "data:image/png"], "photographs as JPEG, drawings exactly"
    red = base64.b64decode(pictures[1].get("src").split(",")[1])
    (images / "again.png").write_bytes(red)
    with Image.open(images / "again.png") as image:
        assert image.convert("RGB").getcolors() == [(64 * 64, (255, 0, 0))]
    assert "image not shown: no such file" in texts(tree(page))


def test_headings_tables_and_pictures_can_be_heard(page):
    root = tree(page)
    levels = [int(element.tag[1]) for element in root.iter() if re.fullmatch("h[1-6]", element.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    for table in root.iter("table"):
        assert table.find("caption") is not None
        assert all(cell.get("scope") for cell in table.iter("th"))
        columns = len(table.findall("thead/tr/th"))
        assert {len(row) for row in table.findall("tbody/tr")} == {columns}
    pictures = [element for element in root.iter("svg") if element.get("aria-hidden") is None]
    assert len(pictures) >= 14
    assert all(element.get("role") == "img" and element.get("aria-label") for element in pictures)


def test_figures_are_those_of_the_report(page, report):
    said = texts(tree(page))
    for words in (
        "200.0 MB",
        "original 1.00 GB: 5.0 times smaller",
        "90.0 %",
        "95 %: 87.0 - 93.0",
        "0.5000",
        "14.2 min",
    ):
        assert words in said
    assert "peak memory 5.33 GB" in said
    assert f"Every linear layer ({len(report.modules)})" in said
    assert "Samples left out: 3" in said
    tips = [element.text for element in tree(page).iter("title")]
    assert "v_proj, block 31: 3" in tips
    assert "q_proj, block 2: 0.001" in tips


def test_the_chosen_rank_is_marked_where_it_is(page):
    spectra = next(e for e in tree(page).iter("section") if e.get("id") == "spectra")
    for chart in spectra.iter("figure"):
        marks = chart.findall("./svg/g/path[@class='mark']")
        places = [float(re.match(r"M([\d.]+)", mark.get("d")).group(1)) for mark in marks]
        assert len(places) == BLOCKS
        left, right = 50.0, 308.0  # where 1 and 4096 are
        expected = [left + (512 + 32 * block - 1) / 4095 * (right - left) for block in range(BLOCKS)]
        assert places == pytest.approx(expected, abs=0.06)


def test_an_unfinished_run_says_what_is_missing(report):
    first = dataclasses.replace(
        report, stages=report.stages[:2], modules=(), blocks=(), examples=(), data={}, command=None, machine={}
    )
    said = texts(tree(report_html(first, RunDetails())))
    assert "Not measured yet: quantized and block tuned and end to end." in said
    assert said.count("Not measured yet.") == 6
    assert "The command was not recorded." in said
    nothing = texts(tree(report_html(CompressionReport(name="n", model="m", quantizer="q"), RunDetails())))
    assert "No stage has been measured yet." in nothing


def luminance(colour):
    """WCAG 2.2, relative luminance of #rrggbb."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_seen_on_their_page(page, scheme):
    variables = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", page.split("@media")[0 if scheme == "light" else 1]))
    for paper in ("page", "card"):
        for text in ("ink", "dim", "link"):
            assert contrast(variables[text], variables[paper]) >= 4.5, (text, paper)
        for number in range(12):
            assert contrast(variables[f"r{number}"], variables[paper]) >= 3, (number, paper)
    assert tuple(variables[f"s{number}"] for number in range(4)) == (LIGHT_SERIES if scheme == "light" else DARK_SERIES)
    assert all(contrast(variables[f"s{number}"], variables["card"]) >= 4.5 for number in range(4)), "they colour words"


def test_scales_grow_in_lightness():
    shades = [luminance(colour) for colour in ramp(24)]
    assert shades == sorted(shades)


def test_scales_and_ticks():
    assert scale(0, 10, 100, 200)(5) == 150
    assert scale(1, 100, 0, 2, log=True)(10) == pytest.approx(1)
    assert scale(3, 3, 0, 10)(3) == 5
    assert log_ticks(0.02, 0.3) == pytest.approx([0.02, 0.05, 0.1, 0.2])
    assert log_ticks(1e-4, 1) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])
    texts = [number_text(value) for value in (0.0, 0.00012, 0.05, 12345.6, 1.5e7, 30.0)]
    assert texts == ["0", "1.2e-4", "0.05", "12,346", "1.5e7", "30"]


def test_every_window_of_block_tuning_is_named_and_four_charts_are_two_and_two(page, report, details):
    named = re.findall(r"</svg>(up to block \d+)</li>", page)
    assert named == [f"up to block {block}" for block in range(5, 32, 6)] * 2
    assert 'class="charts two"' not in page.split('id="head_sparsity"')[1].split("</section>")[0], "three charts"
    four = dataclasses.replace(details, head_sparsity=torch.full((BLOCKS, HEADS, 2, 2), 0.5))
    heads = report_html(report, four).split('id="head_sparsity"')[1].split("</section>")[0]
    assert heads.count("<figure") == 4
    assert 'class="charts two"' in heads
