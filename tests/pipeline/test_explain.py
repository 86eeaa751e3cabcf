"""What `explain` says of a finished run, against the run's own files."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from casp_pl.checkpoint import RunDirectory
from casp_pl.cli import main
from casp_pl.errors import ResourceError

PREFIX = "model.language_model.layers"


def explained(module: str, run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["explain", module, "--run_dir", str(run)]) == 0
    return capsys.readouterr().out


def plan_entry(run: Path, name: str) -> dict[str, object]:
    modules = json.loads((run / "plan.json").read_text())["modules"]
    entry: dict[str, object] = next(module for module in modules if module["name"] == name)
    return entry


def test_a_low_rank_linear_shows_its_spectrum(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{PREFIX}.0.self_attn.q_proj"
    text = explained("layers.0.self_attn.q_proj", finished_run, capsys)
    entry = plan_entry(finished_run, name)
    assert text.startswith(name)
    assert str(entry["why"]) in text
    assert entry["rank"] is not None
    energy = load_file(finished_run / "calibration.safetensors")[f"spectrum.{name}"].double() ** 2
    lines = re.findall(r"rank +(\d+)  error (\S+).*", text)
    assert len(lines) > 3
    for rank, error in lines:
        assert float(error) == pytest.approx(float(energy[int(rank) :].sum() / energy.sum()), rel=0.01, abs=1e-9)
    chosen = re.search(r"rank +(\d+) .*<- chosen", text)
    assert chosen is not None
    assert int(chosen[1]) == entry["rank"]
    assert "factor_bits (3)" in text


def test_a_quantized_linear_shows_what_a_bit_costs(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = explained(f"{PREFIX}.1.mlp.down_proj", finished_run, capsys)
    plan = json.loads((finished_run / "plan.json").read_text())
    scores = {block: sum(module["score"] for module in plan["modules"] if module["block"] == block) for block in (0, 1)}
    place = 1 if scores[1] > scores[0] else 2
    assert f"block 1 has {scores[1]:.4g}, place {place} of 2" in text
    bits = plan_entry(finished_run, f"{PREFIX}.1.mlp.down_proj")["bits"]
    assert f"bits: block 1 has {bits}," in text
    assert "one level less" in text
    assert "one level more" in text
    assert "best within the same budget" in text or "nothing could pay" in text
    report = json.loads((finished_run / "report.json").read_text())
    loss = next(m["relative_proxy_loss"] for m in report["modules"] if m["name"].endswith("1.mlp.down_proj"))
    assert f"relative proxy loss {loss:.2e}" in text


def test_a_run_that_was_stopped_in_quantization(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its report, of the first evaluations, has no linear; one that is written on the way may have some."""

    def stop(*_: object, **__: object) -> None:
        raise ResourceError("stopped")

    monkeypatch.setattr("casp_pl.pipeline.run.quantize_blocks", stop)
    assert main(["fit", *recipe, "--data.samples", "12", "--run_dir", str(tmp_path)]) == 5
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["modules"] == []
    name = f"{PREFIX}.0.self_attn.q_proj"
    text = explained(name, tmp_path, capsys)
    entry = plan_entry(tmp_path, name)
    assert f"rank {entry['rank']:5d}" in text
    assert f"({entry['bits']})" in text
    assert "place" in text
    assert text.splitlines()[-1].startswith("measured after quantization: not yet")
    unknown = {"name": name, "bits_total": None, "relative_proxy_loss": None}
    with RunDirectory.open(tmp_path, RunDirectory.read_only(tmp_path).fingerprint) as run:
        run.write_json("report.json", report | {"modules": [unknown]})
    assert explained(name, tmp_path, capsys) == text


@pytest.mark.parametrize(
    ("module", "words"),
    [("layers.1.mlp.donw_proj", ["Did you mean", f"{PREFIX}.1.mlp.down_proj"]), ("q_proj", ["2 linears", "say which"])],
)
def test_names_that_are_unknown_or_ambiguous(
    module: str, words: list[str], finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", module, "--run_dir", str(finished_run)]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) <= 3
    for word in words:
        assert word in message


def test_a_run_without_plan_is_an_input_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "q_proj", "--run_dir", str(tmp_path)]) == 3
    assert "config.yaml" in capsys.readouterr().err
