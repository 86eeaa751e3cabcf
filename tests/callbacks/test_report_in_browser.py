"""report.html in a real Chromium: nothing fetched, nothing said, nothing cut off, all words legible."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("browser", Path(__file__).with_name("browser.py"))
LEGIBLE = Path(__file__).with_name("legible.js").read_text()


@pytest.fixture(scope="module")
def browser():
    module = importlib.util.module_from_spec(SPEC)
    SPEC.loader.exec_module(module)
    started = module.start()
    if started is None:
        pytest.skip("no browser: neither chromium nor google-chrome is in PATH, nor is pyside6-webengine installed")
    yield started
    started.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_finished_report_is_readable(browser, finished_run, width, scheme):
    path = finished_run / "report.html"
    browser.open(path, width=width, scheme=scheme)
    assert browser.said() == []
    assert browser.requested() == [path.resolve().as_uri()]
    shown = "[document.documentElement.scrollWidth, document.documentElement.clientWidth, innerWidth]"
    needed, there, screen = browser.evaluate(shown)
    assert needed <= there <= screen == width, "nothing sticks out"
    assert browser.evaluate("document.querySelectorAll('svg[role=img]').length") >= 12
    assert browser.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    found = browser.evaluate(LEGIBLE)
    assert found["words"] > 100
    assert found["pale"] == [], "contrast of at least 4.5"
    assert found["tiny"] == [], "at least 10 pixels"
    assert (found["page"] < 0.2) == (scheme == "dark")
