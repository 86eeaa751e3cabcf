"""Rows of the large-model benchmark: what `plan` told beside what a run took, and whose run it was."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import large_model
from benchmarks.large_model import GB, HEADINGS, SHAPES
from casp_pl.cli import main

THIS, OTHER = "0123456" + 33 * "a", "9876543" + 33 * "b"


def planned(recipe, folder):
    """`plan` in this process."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(["plan", *recipe, "--run_dir", str(folder), "--json"]) == 0
    return json.loads(printed.getvalue()), 1.0


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder of runs whose `plan` and `fit` answer at once; what they were asked is in `asked`."""
    monkeypatch.setattr(large_model, "source_commit", lambda: runs.commit)

    def forecast(recipe, folder):
        runs.asked.append(("plan", folder.name))
        told = {"memory_bytes": 100 + len(runs.asked), "size": {"weights": 7}}
        return told | {"plan_from": "plan.json" if folder.exists() else "prediction"}, 1.0

    def fit(command, check):
        runs.asked.append(("fit", Path(command[-1]).name))
        (Path(command[-1]) / "model").mkdir(parents=True)
        for name in ("a", "b"):
            (Path(command[-1]) / "model" / f"{name}.safetensors").write_bytes(b"1234")
        (Path(command[-1]) / "report.json").write_text(json.dumps({"commit": runs.commit}))

    class Runs:
        commit, asked, folder = THIS, [], tmp_path / "run"

    runs = Runs()
    monkeypatch.setattr(large_model, "forecast", forecast)
    monkeypatch.setattr(large_model, "subprocess", SimpleNamespace(run=fit))
    return runs


def test_plan_is_asked_before_anything_of_the_run_exists_and_after_it(runs):
    run = large_model.fit([], runs.folder)
    assert runs.asked == [("plan", "run-not_yet"), ("fit", "run"), ("plan", "run")]
    assert run[1:] == (101, 7, 8, "0123456")
    assert json.loads(runs.folder.with_name("run.forecast.json").read_text())["commit"] == THIS


def test_a_repeated_command_tells_the_same_forecast(runs, capfd):
    first = large_model.fit([], runs.folder)
    again = large_model.fit([], runs.folder)
    assert runs.asked[3:] == [("plan", "run")]
    assert again == first
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("commit", [OTHER, f"{THIS}-dirty", None])
def test_a_finished_row_of_another_commit_names_both(runs, capfd, commit):
    large_model.fit([], runs.folder)
    runs.commit = commit
    said = large_model.fit([], runs.folder).commit
    assert said == f"0123456, not {'unknown' if commit is None else commit.replace(33 * 'a', '')[:7] + commit[40:]}"
    assert f"finished by commit {THIS}, not run again by {commit}" in capfd.readouterr().err


def test_of_a_changed_tree_nobody_knows_whether_it_is_the_same(runs):
    runs.commit = f"{THIS}-dirty"
    assert large_model.fit([], runs.folder).commit == "0123456-dirty"
    assert large_model.fit([], runs.folder).commit == "0123456-dirty, not 0123456-dirty"


@pytest.mark.slow
def test_a_tiny_model_is_forecast_compressed_and_weighed(tmp_path, monkeypatch):
    monkeypatch.setattr(large_model, "forecast", planned)
    in_process = SimpleNamespace(run=lambda command, check: main(command[3:]))
    monkeypatch.setattr(large_model, "subprocess", in_process)
    shape, checkpoint, model = SHAPES["tiny"], tmp_path / "tiny", tmp_path / "view"
    large_model.write_checkpoint(checkpoint, shape, 2)
    large_model.view(checkpoint, model, 2)
    run = large_model.fit(large_model.recipe_of(model, "gptq"), tmp_path / "run")
    cells = dict(zip(HEADINGS, large_model.row("tiny", "gptq", run, checkpoint, shape), strict=True))
    stored = sum(path.stat().st_size for path in (tmp_path / "run" / "model").glob("*.safetensors"))
    assert cells["blocks"] == "2"
    assert cells["weights on disk, bytes"] == cells["plan, bytes"] == f"{stored:,}"
    assert cells["plan - disk, bytes"] == "+0"
    told, peak = run.memory_told, run.report["peak_memory_bytes"]
    assert (cells["plan GB"], cells["plan / peak"]) == (f"{told / GB:.2f}", f"{told / peak:.2f}")
