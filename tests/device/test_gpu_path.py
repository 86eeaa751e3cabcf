"""A whole fit, and `validate`, on a device that refuses tensors of the CPU beside its own, as CUDA does.

No GPU is needed: the device is made of the host's memory, by a C++ compiler; without one this is skipped. It tells
where tensors lie, nothing of kernels or speed.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from casp_pl.cli import main

HERE = Path(__file__).parent
COMPILER = shutil.which("c++")
LITTLE = ["--data.samples", "6", "--data.fine_tuning_samples", "6", "--data.batch_size", "2"]
LITTLE += ["--evaluation.questions", "4", "--evaluation.text_tokens", "64", "--end_to_end.steps", "2"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fake_device.cpp, compiled against the torch that runs here."""
    made = tmp_path_factory.mktemp("device") / "libfake_device.so"
    root = Path(torch.__file__).parent
    headers = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    how = [
        "-O0",
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-w",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    subprocess.run(
        [str(COMPILER), *how, *headers, str(HERE / "fake_device.cpp"), "-o", str(made), *libraries], check=True
    )
    return made


def on_device(library: Path, command: str, quantizer: str, recipe: list[str], *settings: str) -> None:
    """Run a command of casp_pl there, in a process of its own: torch can be told of one such device once."""
    recipe = [part.replace("llava_aqlm", f"llava_{quantizer}") for part in recipe]
    arguments = [str(HERE / "as_fake.py"), str(library), command, *recipe, *LITTLE, *settings]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


def figures(run: Path) -> dict[str, dict[str, float]]:
    """Of all stages by name."""
    return {stage["name"]: stage for stage in json.loads((run / "report.json").read_text())["stages"]}


@pytest.mark.parametrize(
    ("quantizer", "settings"),
    [
        ("aqlm", ["--trainer.precision", "bf16-mixed", "--end_to_end.update_codes", "true"]),
        ("gptq", ["--model.dtype", "bfloat16", "--model.streaming", "true"]),
        ("quip", ["--trainer.precision", "32-true"]),
    ],
)
def test_every_stage_finds_its_tensors_on_the_device(
    library: Path, quantizer: str, settings: list[str], recipe: list[str], stored_tiny: Path, tmp_path: Path
) -> None:
    source = ["--model.source", str(stored_tiny)] if "--model.streaming" in settings else []
    run = ["--run_dir", str(tmp_path / "run"), *settings, *source]
    on_device(library, "fit", quantizer, recipe, *run)
    assert list(figures(tmp_path / "run")) == ["original", "rtn", "quantized", "block_tuned", "end_to_end"]
    assert 0 < figures(tmp_path / "run")["end_to_end"]["kl"] < figures(tmp_path / "run")["rtn"]["kl"]
    if quantizer == "aqlm":
        on_device(library, "validate", quantizer, recipe, *run)
        assert (tmp_path / "run/validate.json").exists()


def test_it_computes_what_a_cpu_computes(library: Path, recipe: list[str], tmp_path: Path) -> None:
    """Until a rounding goes the other way: behind it, the next linears of a random model get other codes altogether."""
    settings = ["--block_tuning.epochs", "0", "--end_to_end.steps", "0", "--trainer.precision", "32-true"]
    on_device(library, "fit", "gptq", recipe, "--run_dir", str(tmp_path / "fake"), *settings)
    own = [part.replace("llava_aqlm", "llava_gptq") for part in recipe]
    assert main(["fit", *own, *LITTLE, "--run_dir", str(tmp_path / "cpu"), *settings]) == 0
    plans = [json.loads((tmp_path / name / "plan.json").read_text())["modules"] for name in ("fake", "cpu")]
    chosen = [[(module["name"], module["rank"], module["bits"]) for module in plan] for plan in plans]
    assert chosen[0] == chosen[1]
    for stage in ("original", "rtn"):
        one, other = (figures(tmp_path / name)[stage]["perplexity"] for name in ("fake", "cpu"))
        assert one == pytest.approx(other, rel=1e-5)
    fake, cpu = (load_file(tmp_path / name / "blocks/000.safetensors") for name in ("fake", "cpu"))
    first = [name for name in cpu if name.startswith("self_attn.") and name.endswith("codes")]
    assert len(first) == 6
    assert all(torch.equal(fake[name], cpu[name]) for name in first)
