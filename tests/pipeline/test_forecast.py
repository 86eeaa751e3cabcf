"""What `plan` says beside what the fit of the same recipe left, and what it says where a machine is too small."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from casp_pl.cli import main
from casp_pl.models.memory import PROCESS_BYTES, Memory
from casp_pl.pipeline.disk_forecast import StageDisk
from casp_pl.pipeline.stage_forecast import judged_stages

STAGES = ["evaluate original", "evaluate rtn", "calibration", "quantize", "evaluate quantized", "block tuning",
          "evaluate block_tuned", "end to end", "evaluate end_to_end", "save"]  # fmt: skip


def forecast(recipe: list[str], run_dir: Path, *more: str) -> dict[str, Any]:
    with redirect_stdout(StringIO()) as printed:
        assert main(["plan", *recipe, "--run_dir", str(run_dir), "--json", *more]) == 0
    told: dict[str, Any] = json.loads(printed.getvalue())
    return told


@pytest.fixture(scope="module")
def afterwards(recipe: list[str], finished_run: Path) -> dict[str, Any]:
    """The forecast with the plan that the run made."""
    return forecast(recipe, finished_run, "--quick")


def test_after_calibration_the_size_is_exact(afterwards: dict[str, Any], finished_run: Path) -> None:
    told = afterwards
    assert told["plan_from"] == str(finished_run / "plan.json")
    assert told["size_is_exact"]
    written = {path.name: path.stat().st_size for path in (finished_run / "model").iterdir()}
    report = json.loads((finished_run / "report.json").read_text())
    assert told["size"]["weights"] == written["model.safetensors"]
    assert told["size"]["tensors"] == report["stages"][-1]["model_bytes"]
    beside = [count for name, count in written.items() if name not in ("README.md", "manifest.json")]
    assert told["size"]["beside"] == sum(beside) - written["model.safetensors"]
    blocks = sum(path.stat().st_size for path in finished_run.glob("tuned/*.safetensors"))
    disk = {stage["name"]: stage["disk_bytes"] for stage in told["stages"]}
    assert disk["block tuning"] == pytest.approx(blocks, rel=0.05), "but the notes beside the tensors"
    outputs = (finished_run / "outputs" / "original.safetensors").stat().st_size
    assert disk["evaluate original"] == pytest.approx(outputs, rel=0.1)


def test_before_calibration_it_says_what_it_cannot_know(recipe: list[str], tmp_path: Path) -> None:
    told = forecast(recipe, tmp_path / "none")
    assert told["plan_from"] == "prediction"
    assert not told["size_is_exact"]
    assert "spectral" in told["size_note"]
    assert [stage["name"] for stage in told["stages"]] == STAGES
    for stage in told["stages"]:
        assert 0 < stage["seconds_low"] < stage["seconds"] < stage["seconds_high"]
        assert stage["fits"]
    equal = forecast(recipe, tmp_path / "none", "--quick", "--low_rank.mode", "uniform")
    assert "which blocks" in equal["size_note"]
    fixed = ("--quick", "--low_rank.mode", "uniform", "--bits.score", "first_last")
    assert forecast(recipe, tmp_path / "none", *fixed)["size_is_exact"]


def test_a_plan_without_a_choice_of_bits(recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--quick", "--bits.overrides", "{self_attn: 3, mlp: 2}")
    told = forecast(recipe, tmp_path / "none", *given)
    assert {module["name"].split(".")[-2]: module["bits"] for module in told["plan"]["modules"]} == {
        "self_attn": 3,
        "mlp": 2,
    }
    assert (told["groups"], told["curve"]) == ([], [])
    assert main(["plan", *recipe, "--run_dir", str(tmp_path / "none"), *given]) == 0
    printed = capsys.readouterr().out
    assert "No bits are left to choose: bits.overrides" in printed
    assert "predicted error" not in printed


def test_another_recipe_does_not_use_the_plan(recipe: list[str], finished_run: Path) -> None:
    told = forecast(recipe, finished_run, "--quick", "--bits.budget", "2.5")
    assert told["plan_from"] == "prediction"


def test_prices_and_curve_agree_with_the_plan(afterwards: dict[str, Any], finished_run: Path) -> None:
    told = afterwards
    plan = json.loads((finished_run / "plan.json").read_text())
    scores = {block: sum(m["score"] for m in plan["modules"] if m["block"] == block and m["rank"] is None)
              for block in (0, 1)}  # fmt: skip
    error = sum(scores[block] * 4.0 ** -told["groups"][block]["bits"] for block in scores)
    for block, group in enumerate(told["groups"]):
        assert group["error_share"] == pytest.approx(scores[block] * 4.0 ** -group["bits"] / error)
        if group["one_bit_more"] is not None:
            change = scores[block] * (4.0 ** -group["one_bit_more"]["bits"] - 4.0 ** -group["bits"]) / error
            assert group["one_bit_more"]["error"] == pytest.approx(change)
    here = [point for point in told["curve"] if point["weights_bytes"] <= told["size"]["weights"]]
    assert here[-1]["error"] >= 1 - 1e-9, "no smaller model has a smaller error"


def test_a_gpu_that_is_not_here_is_planned_for(
    recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def asked(*_: Any) -> None:
        raise AssertionError("a GPU is asked that is not here")

    monkeypatch.setattr("torch.cuda.mem_get_info", asked)
    there = ("--trainer.accelerator", "gpu")
    same = ("--trainer.precision", "32-true")  # a CPU may choose bf16 by itself
    told = forecast(recipe, tmp_path / "none", *there, *same)
    here = forecast(recipe, tmp_path / "none", "--quick", *same)
    assert told["seconds"] is None
    assert told["memory_free"] is None
    assert told["size"] == here["size"]
    for stage, other in zip(told["stages"], here["stages"], strict=True):
        assert (stage["seconds"], stage["seconds_low"], stage["seconds_high"]) == (None, None, None)
        # Python and its libraries are not on the GPU
        assert stage["memory_bytes"] == pytest.approx(other["memory_bytes"] - PROCESS_BYTES, rel=0.1)
        assert stage["host_bytes"] > PROCESS_BYTES
        assert stage["disk_bytes"] == other["disk_bytes"]
        assert stage["fits"] is None
    assert main(["plan", *recipe, "--run_dir", str(tmp_path / "none"), *there]) == 0
    printed = capsys.readouterr().out
    assert "time: not known, trainer.accelerator asks for a GPU and there is none here" in printed
    assert "does not fit" not in printed
    assert main(["fit", *recipe, "--run_dir", str(tmp_path / "none"), *there]) == 2
    assert "there is no GPU here; set it to cpu" in capsys.readouterr().err


def test_a_large_block_is_quantized_in_parts(
    recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("casp_pl.pipeline.probe._PARTS_ABOVE", 0)
    told = forecast(recipe, tmp_path / "none")
    assert "quantization on 1/8 and 1/4 of its width" in told["seconds_from"]
    quantize = next(stage for stage in told["stages"] if stage["name"] == "quantize")
    assert 0 < quantize["seconds_low"] < 0.65 * quantize["seconds"], "what is extrapolated is less sure"


def test_stages_that_do_not_fit_say_the_way_out() -> None:
    seconds = {"evaluate original": 1.0, "quantize": 10.0, "save": 1.0}
    memory = {"evaluate quantized": Memory(100), "quantize": Memory(300), "save": Memory(100, 70)}
    disk = {"evaluate": StageDisk(10), "quantize": StageDisk(50, passing=15), "save": StageDisk(30)}
    free = Memory(200, 60)
    found = judged_stages(seconds, memory, disk, spread=lambda _: 0.2, memory_free=free, disk_free=80)
    assert [stage.fits for stage in found] == [True, False, False]
    assert "data.samples" in found[1].way_out
    assert "Disk" not in found[1].way_out, "60 of 80 bytes are written then"
    assert "Disk" in found[2].way_out
    assert "host" in found[2].way_out
    assert "host" not in found[1].way_out
    assert (found[1].seconds_low, found[1].seconds_high) == pytest.approx((8.0, 17.0))
    passing = {**disk, "quantize": StageDisk(50, passing=25)}
    found = judged_stages(seconds, memory, passing, spread=lambda _: 0.2, memory_free=Memory(300, 60), disk_free=80)
    assert found[1].way_out.startswith("Disk"), "85 bytes are there while it runs"
    unknown = judged_stages(seconds, memory, disk, spread=None, memory_free=None, disk_free=80)
    assert [stage.fits for stage in unknown] == [None, None, False], "the disk is known"
