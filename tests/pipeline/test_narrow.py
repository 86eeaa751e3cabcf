"""The real commands in 40 columns: no line is wider but those that are one word, which stays whole to be copied."""

import shutil
from pathlib import Path

import pytest

from casp_pl.cli import main

ROOT = Path(__file__).parents[2]
WIDTH = 40


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "a run"))


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str], run: Path) -> str:
    """What the command prints, after a look at the width of every line."""
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for line in text.splitlines():
        inseparable = line.replace(str(run.parent), "/").replace("a run", "a_run").split()
        assert len(line) <= WIDTH or len(inseparable) == 1, line
        assert line == line.rstrip()
    return text


def test_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = ["--data.samples", "8", "--data.fine_tuning_samples", "8", "--evaluation.questions", "4"]
    configs = [part for name in ("llava_gptq", "models/tiny") for part in ("--config", f"{ROOT}/configs/{name}.yaml")]
    run = tmp_path / "a run"
    text = printed(["fit", *configs, *small, "--run_dir", str(run)], capsys, run)
    assert text.splitlines()[-4:] == ["model:", str(run / "model"), "report:", str(run / "report.html")]
    assert "  bits codes/total  16.000 / 16.000\n" in text


def test_plan(recipe: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["plan", *recipe, "--quick", "--run_dir", str(run.parent / "new")], capsys, run)
    assert "Which blocks get more bits is decided\n  after calibration;" in text
    assert "  predicted error, this plan 100 %\n    100.0 %\n" in text


@pytest.mark.parametrize("module", ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"])
def test_explain(module: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["explain", module, "--run_dir", str(run)], capsys, run)
    assert text.startswith(f"model.language_model.{module}\n")


def test_data(recipe: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["data", *recipe, "--run_dir", str(run)], capsys, run)
    assert text.endswith(f"\nimages:\n{run.with_name('a run.data.png')}\n")


@pytest.mark.parametrize(
    ("command", "said"),
    [("validate", "validate.md"), ("verify", "whole"), ("report", "report.html")],  # `test` prints as `validate` does
)
def test_others(command: str, said: str, recipe: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = [*recipe, "--run_dir", str(run)] if command == "validate" else [str(run)]
    assert said in printed([command, *where], capsys, run)
