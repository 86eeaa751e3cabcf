"""Exports are read by the tools they are for, each in a fresh process without this package, and give our logits."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from casp_pl.checkpoint import load_compressed, verify
from casp_pl.checkpoint.manifest import Manifest
from casp_pl.cli import main
from casp_pl.errors import ConfigError, NumericsError, ResourceError
from casp_pl.export import export_model
from casp_pl.models import load_model
from tests.export.made_models import IDS, additive, compressed, logits_of_stock_transformers, make_llama, uniform


@pytest.mark.parametrize("entries", [256, 16])
def test_aqlm_layout_in_stock_transformers(entries: int, tmp_path: Path) -> None:
    source, expected = compressed(tmp_path, lambda linear, g, _: additive(linear, g, entries=entries))
    export_model(source, tmp_path / "out", "aqlm")
    torch.testing.assert_close(logits_of_stock_transformers(tmp_path / "out"), expected, rtol=0, atol=1e-4)


def test_aqlm_layout_of_a_llava_leaves_tower_and_head_alone(tmp_path: Path) -> None:
    model, processor = load_model("tiny")
    source, expected = compressed(tmp_path, lambda linear, g, _: additive(linear, g), model, processor)
    export_model(source, tmp_path / "out", "aqlm")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert set(config["linear_weights_not_to_quantize"]) == {
        "lm_head", "model.vision_tower", "model.multi_modal_projector"
    }  # fmt: skip
    logits = logits_of_stock_transformers(tmp_path / "out", multimodal=True)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_values_beyond_float16_are_not_exported_as_infinity(tmp_path: Path) -> None:
    model = make_llama()
    model.lm_head.weight.data[0, 0] = 1e5
    source, _ = compressed(tmp_path, lambda linear, g, _: uniform(linear, g), model)
    with pytest.raises(NumericsError, match="lm_head.*\n.*bfloat16"):
        export_model(source, tmp_path / "out", "dense", dtype="float16")
    export_model(source, tmp_path / "out", "dense", dtype="bfloat16")  # where nothing was left


@pytest.mark.parametrize("layout", ["dense", "casp"])
def test_a_model_is_never_overwritten_nor_is_the_source(layout: str, tmp_path: Path) -> None:
    source, _ = compressed(tmp_path / "one", lambda linear, g, _: uniform(linear, g))
    other, _ = compressed(tmp_path / "other", lambda linear, g, _: uniform(linear, g, bits=3))
    for out in (source, other):
        with pytest.raises(ResourceError, match="not overwritten"):
            export_model(source, out, layout)
        assert verify(out) == []
        assert load_compressed(out)[0].config.quantization_config is not None
    (tmp_path / "empty").mkdir()
    export_model(source, tmp_path / "empty", layout)
    assert verify(tmp_path / "empty") == []


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-5), ("float16", 0.02), ("bfloat16", 0.1)])
def test_dense_in_stock_transformers(dtype: str | None, tolerance: float, tmp_path: Path) -> None:
    source, expected = compressed(tmp_path, lambda linear, g, _: uniform(linear, g))
    export_model(source, tmp_path / "out", "dense", dtype=dtype)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    logits = logits_of_stock_transformers(tmp_path / "out")
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)


def test_own_layout_is_whole_and_equal(tmp_path: Path) -> None:
    source, expected = compressed(tmp_path, lambda linear, g, _: uniform(linear, g, bits=3))
    assert main(["export", str(source), "--format", "casp", "--out", str(tmp_path / "out")]) == 0
    assert verify(tmp_path / "out") == []
    with torch.no_grad():
        assert torch.equal(load_compressed(tmp_path / "out")[0](input_ids=IDS).logits, expected)


@pytest.mark.parametrize("layout", ["aqlm", "gptq", "gptq_v2"])
def test_low_rank_layers_are_refused_with_a_way_out(
    layout: str, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(finished_run), "--format", layout, "--out", str(tmp_path / "out")]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "low_rank" in message
    assert "dense" in message
    assert len(message.splitlines()) <= 3
    assert not (tmp_path / "out").exists()


def test_a_real_run_exports_as_dense(finished_run: Path, tmp_path: Path) -> None:
    assert main(["export", str(finished_run), "--format", "dense", "--out", str(tmp_path / "out")]) == 0
    with torch.no_grad():
        expected = load_compressed(finished_run / "model")[0](input_ids=IDS).logits
    logits = logits_of_stock_transformers(tmp_path / "out", multimodal=True)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_what_cannot_be_expressed_says_why(tmp_path: Path) -> None:
    source, _ = compressed(tmp_path, lambda linear, g, number: additive(linear, g, entries=256 if number else 16))
    with pytest.raises(ConfigError, match="one format for all layers"):
        export_model(source, tmp_path / "out", "aqlm")
    with pytest.raises(ConfigError, match="kind additive"):
        export_model(source, tmp_path / "out", "gptq")
    with pytest.raises(ConfigError, match="formats are"):
        export_model(source, tmp_path / "out", "gguf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious.txt").write_text("mine")
    with pytest.raises(ResourceError, match="not overwritten"):
        export_model(source, tmp_path / "out", "dense")
    assert (tmp_path / "out/precious.txt").read_text() == "mine"


@pytest.mark.parametrize("moment", ["fsync", "rename"])
def test_a_killed_export_leaves_no_directory(tmp_path, moment):
    source, _ = compressed(tmp_path, lambda linear, generator, _: uniform(linear, generator))
    out = tmp_path / "out" / "dense"
    out.parent.mkdir()
    command = ["export", str(source), "--format", "dense", "--out", str(out)]
    code = (
        f"import os, signal, sys; from casp_pl.cli import main; os.{moment} = lambda *_, **__: os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", f"{code}; main(sys.argv[1:])", *command], timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    (leftover,) = (tmp_path / "out").iterdir()
    assert leftover.name.startswith(".tmp")
    assert main(command) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dense"]
    assert Manifest.load(out).problems(out) == {}
