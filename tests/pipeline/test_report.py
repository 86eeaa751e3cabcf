"""The report of real runs: finished, made again, stopped after a stage."""

import json
import os
import shutil
import signal
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from casp_pl.cli import main


def _sections(run: Path) -> dict[str, ElementTree.Element]:
    root = ElementTree.fromstring((run / "report.html").read_text(encoding="utf-8"))
    return {element.attrib["id"]: element for element in root.iter("section")}


def _said(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def test_a_finished_run_shows_everything(finished_run: Path) -> None:
    sections = _sections(finished_run)
    for name in ("stages", "bits", "proxy_loss", "attention_sparsity", "head_sparsity", "spectra", "losses", "timings"):
        assert sections[name].find(".//figure/svg") is not None, name
    said = " ".join(map(_said, sections.values()))
    assert "Not measured" not in said
    assert "not finished" not in said
    titles = [figure.text for figure in sections["losses"].iter("figcaption")]
    assert titles == ["block tuning: training error", "block tuning: held-back error", "end to end: KL, nats"]
    assert len(sections["head_sparsity"].findall(".//figure")) == 4
    report = json.loads((finished_run / "report.json").read_text())
    assert report["planned_stages"] == [stage["name"] for stage in report["stages"]]
    assert report["command"].startswith("python -m casp_pl fit --config")
    assert report["command"] in _said(sections["made"])
    measured = sum(stage["seconds"] for stage in report["stages"]) + report["work_seconds"]["calibration"]
    assert 0 < measured <= report["wall_seconds"]


def test_a_report_is_made_again_from_the_files(finished_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    before = {path: path.read_bytes() for path in (*copy.glob("report.*"), *copy.glob("*.png"))}
    assert len(before) > 8
    for path in before:
        if path.name != "report.json":
            path.unlink()
    assert main(["report", str(copy)]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert main(["verify", str(copy)]) == 0


def test_a_run_without_a_report_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "fingerprint": {}, "artifacts": {}}))
    assert main(["report", str(tmp_path)]) == 3
    assert "report.json" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == 6
    assert "none" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stopped_run_has_a_report_of_what_it_did(recipe: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"

    def stop() -> None:
        manifest, deadline = run / "manifest.json", time.monotonic() + 120
        while time.monotonic() < deadline and not (manifest.exists() and '"report.json"' in manifest.read_text()):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    watching = threading.Thread(target=stop)
    watching.start()
    assert main(["fit", *recipe, "--run_dir", str(run)]) == 143
    watching.join()
    assert not (run / "plan.json").exists(), "the signal came too late to prove anything"
    sections = _sections(run)
    assert "Not measured yet: " in _said(sections["summary"])
    assert "block tuned and end to end" in _said(sections["summary"])
    assert _said(sections["bits"]).endswith("Not measured yet.")
    assert "original" in _said(sections["stages"])
    assert sections["examples"].find(".//li") is not None
    assert main(["report", str(run)]) == 0
    assert _said(_sections(run)["stages"]) == _said(sections["stages"])
