"""report.html in a real Chromium: nothing fetched, nothing said, nothing cut off or missing, all words legible."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("browser", Path(__file__).with_name("browser.py"))
LEGIBLE = Path(__file__).with_name("legible.js").read_text()
SIZES = "[document.documentElement.scrollWidth, document.documentElement.clientWidth, innerWidth]"
COLUMNS = (
    "new Set([...document.querySelectorAll('#head_sparsity figure')].map(f => f.getBoundingClientRect().left)).size"
)


@pytest.fixture(scope="module")
def browser():
    module = importlib.util.module_from_spec(SPEC)
    SPEC.loader.exec_module(module)
    started = module.start()
    if started is None:
        pytest.skip("no browser: neither chromium nor google-chrome is in PATH, nor was `make browser` run")
    yield started
    started.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 1280])
def test_a_finished_report_is_readable(browser, finished_run, width, scheme):
    path = finished_run / "report.html"
    browser.open(path, width=width, scheme=scheme)
    assert browser.said() == []
    assert browser.requested() == [path.resolve().as_uri()]
    assert browser.evaluate("document.querySelectorAll('svg[role=img]').length") >= 12
    assert browser.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    found = browser.evaluate(LEGIBLE)
    needed, there, screen = browser.evaluate(SIZES)
    assert needed <= there <= screen == width, "nothing sticks out"
    assert found["words"] > 100
    assert found["pale"] == [], "contrast of at least 4.5"
    assert found["tiny"] == [], "at least 10 pixels"
    assert found["overlapping"] == [], "no word lies on another"
    assert found["empty"] == [], "every section of the contents is there"
    assert (found["page"] < 0.2) == (scheme == "dark")
    assert browser.evaluate(COLUMNS) == (2 if width == 1280 else 1), "four charts are two and two"


@pytest.mark.slow
def test_what_is_wrong_with_a_page_is_seen(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<!DOCTYPE html><meta name=viewport content='width=device-width'><body style='background:#fff;color:#000'>"
        "<nav><a href='#there'>There</a> <a href='#empty'>Empty</a> <a href='#gone'>Gone</a></nav>"
        "<section id=there><h2>There</h2><p style='font-size:8px'>tiny</p><p style='color:#ccc'>pale</p></section>"
        "<section id=empty><h2>Empty</h2></section>"
        "<p style='position:absolute;left:9px;top:300px'>below</p><p style='position:absolute;left:9px;top:306px'>above"
        "</p><img src='missing.png'><div style='width:2000px'>wide</div>"
    )
    browser.open(page, width=390, scheme="light")
    found = browser.evaluate(LEGIBLE)
    assert (found["pale"], found["tiny"]) == (["pale"], ["tiny"])
    assert (found["overlapping"], found["empty"]) == (["below | above"], ["Empty", "Gone"])
    needed, there, _ = browser.evaluate(SIZES)
    assert needed > there
    assert len(browser.requested()) == 2
