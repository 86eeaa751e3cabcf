"""The report of real runs: finished, made again, stopped after a stage."""

import json
import os
import shutil
import signal
import sys
import threading
import time
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from casp_pl.cli import main
from casp_pl.kernels.compiled import backend_name
from casp_pl.linalg.hadamard import hadamard_matrix
from casp_pl.linalg.hadamard_extension import runs_extension
from casp_pl.linalg.orthogonal import transform_name

ROOT = Path(__file__).parents[2]
QUIP = ["--config", str(ROOT / "configs/llava_quip.yaml"), "--config", str(ROOT / "configs/models/tiny.yaml")]


def _sections(run: Path) -> dict[str, ElementTree.Element]:
    root = ElementTree.fromstring((run / "report.html").read_text(encoding="utf-8"))
    return {element.attrib["id"]: element for element in root.iter("section")}


def _said(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def _rows(element: ElementTree.Element) -> list[list[str]]:
    return [[_said(cell) for cell in row] for row in element.iter("tr")]


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
    assert report["machine"]["kernels"] == backend_name(torch.device("cpu"))
    assert "Hadamard transform" not in report["machine"], "AQLM has none"
    assert ["kernels", report["machine"]["kernels"]] in _rows(sections["made"])
    assert f"- kernels: {report['machine']['kernels']}\n" in (finished_run / "report.md").read_text()
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


@pytest.mark.slow
def test_a_run_says_which_transform_it_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = types.ModuleType("fast_hadamard_transform")
    package.hadamard_transform = lambda x, scale: scale * x @ hadamard_matrix(x.shape[-1]).to(x.dtype)
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", package)
    monkeypatch.setattr("casp_pl.linalg.hadamard_extension._TRIED", ("cpu",))
    runs_extension.cache_clear()
    short = ["--block_tuning.epochs", "0", "--end_to_end.steps", "0", "--evaluation.questions", "8"]
    try:
        assert main(["fit", *QUIP, *short, "--run_dir", str(tmp_path / "run")]) == 0
    finally:
        monkeypatch.undo()
        runs_extension.cache_clear()
    used = "fast-hadamard-transform for powers of two, ours for others"
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(f"kernels: {backend_name(torch.device('cpu'))}, Hadamard transform: {used}") == 1
    assert main(["report", str(tmp_path / "run")]) == 0
    assert transform_name(torch.device("cpu")) == "ours", "by now; the report tells of the run"
    assert ["Hadamard transform", used] in _rows(_sections(tmp_path / "run")["made"])


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
