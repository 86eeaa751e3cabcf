"""The whole job on the tiny model: artifacts, the plan kept, a reload in a fresh process, resume after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from casp_pl import load_compressed
from casp_pl.checkpoint import RunDirectory
from casp_pl.cli import main
from casp_pl.layers import LowRankLinear, QuantizedLinear
from casp_pl.models import adapt, load_model
from casp_pl.models.surgery import compressed_layers
from casp_pl.pipeline.block_files import BlockFiles

PICTURES = ("stages", "bits", "spectra", "losses", "attention_sparsity", "head_sparsity", "proxy_loss", "timings")
STAGES = ["original", "rtn", "quantized", "block_tuned", "end_to_end"]


def test_run_directory_holds_everything(finished_run: Path) -> None:
    report = json.loads((finished_run / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == STAGES
    plan = json.loads((finished_run / "plan.json").read_text())
    assert len(plan["modules"]) == len(report["modules"]) == 14
    manifest = json.loads((finished_run / "manifest.json").read_text())
    names = manifest["artifacts"]
    for name in ("plan.json", "blocks/001.safetensors", "tuned/001.safetensors", "report.json", "model"):
        assert any(entry == name or entry.startswith(name + "/") for entry in names), name
    assert main(["verify", str(finished_run)]) == 0
    assert list((finished_run / "tensorboard").glob("events.*"))


def test_what_block_tuning_leaves_is_rounded_for_all_but_further_training(finished_run: Path) -> None:
    adapter = adapt(load_model("tiny")[0])
    tuned = BlockFiles(RunDirectory.read_only(finished_run), "tuned", adapter)
    filed = load_file(finished_run / "tuned/001.safetensors")
    tables = [name for name in filed if name.endswith(("codebooks", "scales"))]
    stored, trained = tuned[1].state_dict(), tuned.as_trained()[1].state_dict()
    for name in tables:
        assert torch.equal(trained[name], filed[name]), name
        assert torch.equal(stored[name], filed[name].half().float()), name
    assert any(not torch.equal(filed[name], filed[name].half().float()) for name in tables)


def test_tensorboard_shows_every_stage_block_and_loss(finished_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = json.loads((finished_run / "report.json").read_text())
    events = EventAccumulator(str(finished_run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    for figure in ("vqa_accuracy", "perplexity", "bits_per_weight_total"):
        shown = [(event.step, pytest.approx(event.value, rel=1e-5)) for event in events.Scalars(f"stage/{figure}")]
        assert shown == [(step, stage[figure]) for step, stage in enumerate(report["stages"])]
    losses = {module["name"]: module["relative_proxy_loss"] for module in report["modules"]}
    for event in events.Scalars("relative_proxy_loss/down_proj"):
        assert event.value == pytest.approx(losses[f"model.language_model.layers.{event.step}.mlp.down_proj"], rel=1e-5)
    tags = events.Tags()
    assert {f"block_tuning/{kind}_{block}" for kind in ("train", "held_back") for block in ("000", "001")} <= set(
        tags["scalars"]
    )
    assert len(events.Scalars("end_to_end/train_kl")) == 4, "one point a step"
    assert {"bits/v_proj", "rank/q_proj", "score", "attention_sparsity/text_to_image"} <= set(tags["scalars"])
    drawn = {path.stem for path in finished_run.glob("*.png")}
    assert set(tags["images"]) == {f"pictures/{name}" for name in drawn}
    assert drawn == {*PICTURES, "examples"}


def test_images_and_text_really_enter(finished_run: Path) -> None:
    counts = json.loads((finished_run / "report.json").read_text())["data"]["calibration"]
    assert counts["image_tokens"] == 16 * counts["image_samples"] > 0
    assert counts["text_samples"] > 0
    calibration = load_file(finished_run / "calibration.safetensors")
    assert calibration["tokens"].tolist() == [counts["image_tokens"] + counts["text_tokens"], counts["image_tokens"]]


def test_layers_are_what_the_plan_says(finished_run: Path) -> None:
    model, _ = load_compressed(finished_run / "model")
    layers = compressed_layers(model)
    plan = json.loads((finished_run / "plan.json").read_text())["modules"]
    assert sorted(layers) == sorted(module["name"] for module in plan)
    assert len({module["bits"] for module in plan}) > 1, "the tiny recipe's budget gives blocks different bits"
    for module in plan:
        layer = layers[module["name"]]
        if module["rank"] is None:
            assert isinstance(layer, QuantizedLinear)
            groups = -(-layer.in_features // layer.group_length) * layer.group_length
            assert layer.code_bits == module["bits"] * layer.out_features * groups
        else:
            assert isinstance(layer, LowRankLinear)
            assert layer.rank == module["rank"]


def test_query_and_key_get_their_own_factors(finished_run: Path) -> None:
    model, _ = load_compressed(finished_run / "model")
    attention = adapt(model).blocks[0].self_attn
    query, key = attention.q_proj.dequantize(), attention.k_proj.dequantize()
    original = adapt(load_model("tiny")[0]).blocks[0].self_attn
    for layer, weight in ((query, original.q_proj.weight), (key, original.k_proj.weight)):
        cosine = nn.functional.cosine_similarity(layer.flatten(), weight.flatten(), dim=0)
        assert cosine > 0.5, "each product must stand for its own weight"
    assert query.shape != key.shape


def test_report_counts_the_bytes_on_disk(finished_run: Path) -> None:
    report = json.loads((finished_run / "report.json").read_text())
    tensors = load_file(finished_run / "model" / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == report["stages"][-1]["model_bytes"]


def test_fresh_process_gives_the_same_logits(finished_run: Path, tmp_path: Path) -> None:
    model, processor = load_compressed(finished_run / "model")
    tokens = processor.tokenizer("is there a red shape?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    torch.save(tokens, tmp_path / "tokens.pt")
    script = f"""
import torch, casp_pl
from transformers import AutoModelForImageTextToText
model, info = AutoModelForImageTextToText.from_pretrained({str(finished_run / "model")!r}, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
with torch.no_grad():
    logits = model(input_ids=torch.load({str(tmp_path / "tokens.pt")!r}, weights_only=True)).logits
torch.save(logits, {str(tmp_path / "logits.pt")!r})
model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
    actual = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_rerun_skips_what_is_complete(finished_run: Path, recipe: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*.safetensors")}
    assert main(["fit", *recipe, "--run_dir", str(finished_run)]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*.safetensors")} == before


def test_other_recipe_in_the_same_directory_is_refused(
    finished_run: Path, recipe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *recipe, "--run_dir", str(finished_run), "--quantization.propagation", "0.25"]) == 2
    message = capsys.readouterr().err
    assert "quantization.propagation" in message
    assert len(message.splitlines()) <= 3


def test_damaged_blocks_are_made_again(
    finished_run: Path, recipe: list[str], tensor_digests: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    flipped = bytearray((run / "blocks/000.safetensors").read_bytes())
    flipped[-1] ^= 1
    (run / "blocks/000.safetensors").write_bytes(flipped)
    os.truncate(run / "tuned/001.safetensors", 100)
    assert main(["verify", str(run)]) == 6
    assert main(["fit", *recipe, "--run_dir", str(run)]) == 0
    assert main(["verify", str(run)]) == 0
    assert tensor_digests(run) == tensor_digests(finished_run)


_DIES_IN = """
import os, shutil, signal, sys
from casp_pl.checkpoint import RunDirectory
from casp_pl.cli import main

owner, name, place = {"shutil": shutil, "RunDirectory": RunDirectory}[sys.argv[1]], *sys.argv[2:4]
work = getattr(owner, name)

def work_or_die(*arguments, **keywords):
    if any(str(argument).endswith(place) for argument in arguments):
        os.kill(os.getpid(), signal.SIGKILL)
    return work(*arguments, **keywords)

setattr(owner, name, work_or_die)
main(sys.argv[4:])
"""


def _killed_in(owner: str, name: str, place: str, command: list[str]) -> None:
    """Run casp_pl in a process that is killed where it calls `owner.name` with something that ends with `place`."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    dying = [sys.executable, "-c", _DIES_IN, owner, name, place, *command]
    assert subprocess.run(dying, env=environment, timeout=300).returncode == -signal.SIGKILL


@pytest.mark.slow
def test_sigkill_between_a_block_and_its_entry_leads_to_the_same_model(
    finished_run: Path, recipe: list[str], tensor_digests: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (run / "blocks/001.safetensors").unlink()
    command = ["fit", *recipe, "--run_dir", str(run)]
    _killed_in("RunDirectory", "_record", "blocks/001.safetensors", command)
    assert (run / "blocks/001.safetensors").exists()
    assert "blocks/001.safetensors" not in json.loads((run / "manifest.json").read_text())["artifacts"]
    assert main(command) == 0
    assert main(["verify", str(run)]) == 0
    assert tensor_digests(run) == tensor_digests(finished_run)


@pytest.mark.slow
def test_a_model_that_is_no_longer_one_is_made_again(
    finished_run: Path, recipe: list[str], tensor_digests: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (run / "model/config.json").write_text("{")
    assert main(["fit", *recipe, "--run_dir", str(run)]) == 0
    assert main(["verify", str(run)]) == 0
    assert tensor_digests(run) == tensor_digests(finished_run)


@pytest.mark.slow
def test_sigkill_while_something_is_deleted_leaves_nothing_for_ever(
    finished_run: Path, recipe: list[str], tensor_digests: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    for made_again in ("stages/rtn.json", "blocks/001.safetensors", "end_to_end/001.safetensors"):
        (run / made_again).unlink()
    command = ["fit", *recipe, "--end_to_end.checkpoint_every", "2", "--run_dir", str(run)]
    folders = ("rtn", "linears/001", "end_to_end/steps")
    for folder in folders:
        _killed_in("shutil", "rmtree", folder, command)
        next((run / folder).rglob("*.safetensors")).unlink()  # a deletion is seldom killed before its first file
    assert main(command) == 0
    assert [folder for folder in folders if (run / folder).exists()] == []
    assert main(["verify", str(run)]) == 0
    assert tensor_digests(run) == tensor_digests(finished_run)


@pytest.mark.slow
def test_a_run_that_is_stopped_again_and_again_ends_bit_identical(
    recipe: list[str], finished_run: Path, tensor_digests: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "casp_pl", "fit", *recipe, "--run_dir", str(run)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for wait_for, number, code in (
        ("blocks/000.safetensors", signal.SIGKILL, -signal.SIGKILL),
        ("tuned/000.safetensors", signal.SIGTERM, 143),
        ("end_to_end/000.safetensors", signal.SIGINT, 130),
    ):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 240
        while not (run / wait_for).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        _, message = process.communicate(timeout=60)
        assert process.returncode == code, message
        assert ("the same command goes on from here" in message) == (number != signal.SIGKILL)
        assert not (run / "model").exists(), "the signal came too late to prove anything"
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "COLUMNS": "40", "TERM": "dumb"}
    last = subprocess.run(command, env=environment | plain, check=True, timeout=300, capture_output=True)
    assert last.stdout.isascii()
    wide = [line for line in last.stdout.decode().splitlines() if len(line) > 40]
    assert wide == [str(run / "model"), str(run / "report.html")], "what is to be copied stays whole"
    assert b"\x1b" not in last.stdout + last.stderr
    assert not list(run.rglob(".tmp*"))
    assert tensor_digests(run) == tensor_digests(finished_run)
