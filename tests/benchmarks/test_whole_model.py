"""Runs of the whole-model benchmark lie by commit, and only Markdown goes to standard output."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import whole_model
from benchmarks.output import stdout_as_stderr
from casp_pl.callbacks.report_markdown import markdown_table


@pytest.mark.parametrize(
    ("commit", "name"), [("0a1b", "0a1b"), ("0a1b-dirty", r"0a1b-dirty-\d+-\d+"), (None, r"unknown-\d+-\d+")]
)
def test_only_a_clean_commit_finds_its_runs_again(commit, name, tmp_path, monkeypatch):
    monkeypatch.setattr(whole_model, "source_commit", lambda: commit)
    folder = whole_model.commit_folder(tmp_path)
    assert folder.parent == tmp_path
    assert re.fullmatch(name, folder.name)


def a_fit(command):
    """Prints as a fit does, and leaves a report."""
    print("quantize ... 50 %")
    figures = {"bits_per_weight_total": 2.25, "perplexity": 1234.5, "kl": 0.5}
    names = {"original": 4.0, "rtn": 8.0, "quantized": 37.0}
    report = {
        "work_seconds": {"calibration": 20.0, "quantize": 30.0},
        "modules": [{"seconds": 11.0}, {"seconds": 12.0}],
        "stages": [{"name": name, "seconds": seconds, **figures} for name, seconds in names.items()],
    }
    folder = Path(command[command.index("--run_dir") + 1])
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report))
    return 0


def test_the_table_is_markdown_with_seconds_by_stage(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(whole_model, "source_commit", lambda: "0a1b")
    monkeypatch.setattr(whole_model, "casp_pl", a_fit)
    monkeypatch.setattr(sys, "argv", ["whole_model", "--out", str(tmp_path), "--methods", "gptq", "--plain"])
    whole_model.main()
    out, errors = capfd.readouterr()
    rows = [
        ["original", "", "", "2.250", "1,234.50", "0.500", "", "", "", "4"],
        ["RTN g64", "no", "no", "2.250", "1,234.50", "0.500", "", "", "", ""],
        ["GPTQ g64 act-order", "no", "no", "2.250", "1,234.50", "0.500", "20", "30", "23", "7"],
    ]
    assert out == f"Runs of 0a1b\n\n{markdown_table(whole_model.HEADER, rows)}\n"
    assert "quantize ... 50 %" in errors


def test_whatever_writes_inside_writes_to_standard_error(capfd):
    with stdout_as_stderr():
        print("of Python")
        os.write(1, b"of compiled code\n")
        subprocess.run([sys.executable, "-c", "print('of a child')"], check=True)
    print("afterwards")
    out, errors = capfd.readouterr()
    assert out == "afterwards\n"
    assert sorted(errors.splitlines()) == ["of Python", "of a child", "of compiled code"]
