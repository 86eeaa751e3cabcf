"""Nothing outside the libraries that belong here is imported, however a class is named."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from casp_pl.cli import main

ROOT = Path(__file__).parents[2]
MIXTURE = "data: {source: {class_path: casp_pl.data.Mixture, init_args: {sources: [evil.Thing], weights: [1.0]}}}"


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that comes into being when the module `evil`, which can be imported, is."""
    path = tmp_path / "imported"
    (tmp_path / "evil.py").write_text(f"open({str(path)!r}, 'w').close()\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return path


def refused(arguments: Sequence[str], mark: Path, capsys: pytest.CaptureFixture[str]) -> str:
    code = main([*arguments])
    message = capsys.readouterr().err
    assert not mark.exists(), message
    assert code == 2, message
    assert len(message.splitlines()) <= 3
    return message


@pytest.mark.parametrize(
    "text",
    [
        "quantizer: evil.Thing",
        "quantizer: {class_path: evil.Thing}",
        "quantizer: {init_args: {}, class_path: evil.Thing}",
        "baseline: evil.Thing",
        "baseline: {class_path: evil.Thing}",
        "scoring: evil.Thing",
        "trainer: {callbacks: evil.Thing}",
        "trainer: {callbacks: [{class_path: evil.Thing}]}",
        "trainer: {callbacks+: [evil.Thing]}",
        "trainer: {strategy: {class_path: evil.Thing}}",
        "trainer: {logger: [{class_path: evil.Thing}]}",
        MIXTURE,
        "quantizer: casp_pl.checkpoint.atomic.os.system",
    ],
)
def test_in_a_recipe(text: str, mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(text + "\n")
    message = refused(["fit", "--config", str(tmp_path / "recipe.yaml")], mark, capsys)
    assert "is refused: only classes of casp_pl, lightning, torch are imported" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["--quantizer", "evil.Thing"],
        ["--quantizer=evil.Thing"],
        ["--quantizer.class_path", "evil.Thing"],
        ["--quantizer.class_path=evil.Thing"],
        ['--quantizer={"class_path": "evil.Thing"}'],
        ["--quantizer.help", "evil.Thing"],
        ["--quantizer.help=evil.Thing"],
        ["--baseline=evil.Thing"],
        ["--trainer.callbacks+=evil.Thing"],
        ["--trainer.callbacks+", "evil.Thing"],
        ["--trainer.callbacks", "[evil.Thing]"],
        ["--data.source=Mixture", "--data.source.sources+=evil.Thing"],
    ],
)
def test_on_the_command_line(arguments: list[str], mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["fit", "--config", str(ROOT / "configs/llava_aqlm.yaml"), *arguments], mark, capsys)
    assert "evil.Thing" in message


def test_in_a_file_for_one_class(mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quantizer.yaml").write_text("class_path: evil.Thing\n")
    message = refused(["fit", "--quantizer", str(tmp_path / "quantizer.yaml")], mark, capsys)
    assert f"quantizer: the class in {tmp_path / 'quantizer.yaml'} cannot be used" in message


def test_in_the_environment(mark: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    monkeypatch.setenv("PL_PLAN__QUANTIZER", "evil.Thing")
    assert "evil.Thing" in refused(["plan", "--model.source", "no/model"], mark, capsys)


def test_in_the_recipe_that_a_run_kept(mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("quantizer: evil.Thing\n")
    assert "evil.Thing" in refused(["explain", "--run_dir", str(tmp_path), "q_proj"], mark, capsys)


def test_a_recipe_is_a_file(mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", '--config={"quantizer": "evil.Thing"}']) == 3
    assert "no such file" in capsys.readouterr().err
    assert not mark.exists()
