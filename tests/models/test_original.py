"""Models to compress from directories and from the hub: what is unsafe or out of reach is refused before it is read."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from casp_pl.cli import main
from casp_pl.errors import InputError, IntegrityError
from casp_pl.models import load_model
from casp_pl.models.families import write_family
from casp_pl.models.hub import hub_directory


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A directory with the checkpoint of a tiny LLaMA."""
    write_family("LlamaForCausalLM", tmp_path / "original")
    return tmp_path / "original"


def _config(original: Path, **changes: object) -> None:
    path = original / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _index(original: Path, file: str) -> None:
    (original / "model.safetensors").rename(original.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": file}}
    (original / "model.safetensors.index.json").write_text(json.dumps(index))


def _only_pickles(original: Path) -> None:
    (original / "model.safetensors").rename(original / "pytorch_model.bin")


def _cut(original: Path) -> None:
    os.truncate(original / "model.safetensors", 40)


def _lose_a_weight(original: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(original / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda path: _index(path, "../outside.safetensors"), IntegrityError, "outside the directory: refused"),
        (lambda path: _index(path, "/etc/outside.safetensors"), IntegrityError, "outside the directory: refused"),
        (_only_pickles, IntegrityError, r"pickles alone \(pytorch_model.bin\)"),
        (_cut, IntegrityError, "no sound safetensors file"),
        (lambda path: (path / "config.json").write_text("{"), IntegrityError, "cannot be read"),
        (lambda path: (path / "config.json").unlink(), InputError, "holds no model"),
        (lambda path: (path / "model.safetensors").unlink(), InputError, "holds no weights"),
        (lambda path: _config(path, quantization_config={"quant_method": "awq"}), InputError, r"already \(awq\)"),
        (lambda path: _config(path, model_type="unheard_of"), InputError, "cannot load"),
        (_lose_a_weight, InputError, "lacks 1 weights .* model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_what_is_broken_or_unsafe(
    original: Path, damage: Callable[[Path], object], error: type[Exception], words: str
) -> None:
    damage(original)
    with pytest.raises(error, match=words) as caught:
        load_model(str(original))
    assert len(str(caught.value).splitlines()) <= 3


def test_code_that_comes_along_is_ignored_and_said(original: Path, caplog: pytest.LogCaptureFixture) -> None:
    _config(original, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (original / "evil.py").write_text("raise SystemExit('executed')")
    assert type(load_model(str(original))[0]).__name__ == "LlamaForCausalLM"
    assert "auto_map" in caplog.text


def test_an_unsafe_original_ends_a_fit_with_code_6(
    original: Path, recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _index(original, "../outside.safetensors")
    arguments = [*recipe, "--run_dir", str(tmp_path / "run"), "--model.source", str(original)]
    assert main(["fit", *arguments]) == 6
    assert "outside the directory: refused" in capsys.readouterr().err


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A hub that takes connections and never answers, and an empty cache."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("casp_pl.models.hub._SECONDS", 0.5)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield
    server.close()


@pytest.mark.usefixtures("silent_hub")
def test_a_hub_that_does_not_answer() -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match="'org/name': the hub is out of reach and there is no copy") as caught:
        hub_directory("org/name")
    assert time.monotonic() - start < 5
    assert len(str(caught.value).splitlines()) == 1


def _cached(original: Path, cache: Path) -> None:
    """The layout of the hub's cache, with one snapshot."""
    folder = cache / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots").mkdir()
    original.rename(folder / "snapshots" / ("0" * 40))


@pytest.mark.usefixtures("silent_hub")
def test_the_copy_in_the_cache_will_do(original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _cached(original, tmp_path / "cache")
    model, _ = load_model("org/name")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert "org/name is read from its cache" in caplog.text


@pytest.mark.slow
def test_offline_command(tmp_path: Path, recipe: list[str]) -> None:
    """The command itself, in a fresh process: one line, code 3, soon."""
    command = [sys.executable, "-m", "casp_pl", "plan", *recipe, "--model.source", "org/name"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 3
    assert result.stderr.strip().splitlines() == [
        "model.source: cannot load 'org/name': HF_HUB_OFFLINE is set and there is no copy in its cache. Give a local "
        "directory."
    ]
