"""A whole fit, and `test`, on a device that refuses tensors of the CPU beside its own, as CUDA does.

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

from casp_pl.cli import main

HERE = Path(__file__).parent
COMPILER = shutil.which("c++")
QUESTIONS = ["--evaluation.questions", "10"]

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
    arguments = [str(HERE / "as_fake.py"), str(library), command, *recipe, *QUESTIONS, *settings]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


def figures(run: Path) -> list[dict[str, float]]:
    """Of all stages."""
    stages: list[dict[str, float]] = json.loads((run / "report.json").read_text())["stages"]
    return stages


@pytest.mark.parametrize(
    ("quantizer", "settings"),
    [
        ("aqlm", ["--trainer.precision", "bf16-mixed", "--end_to_end.update_codes", "true"]),
        ("gptq", ["--model.dtype", "bfloat16", "--end_to_end.activation_checkpointing", "true"]),
        ("quip", ["--trainer.precision", "32-true"]),
    ],
)
def test_every_stage_finds_its_tensors_on_the_device(
    library: Path, quantizer: str, settings: list[str], recipe: list[str], tmp_path: Path
) -> None:
    run = ["--run_dir", str(tmp_path / "run"), *settings]
    on_device(library, "fit", quantizer, recipe, *run)
    names = [stage["name"] for stage in figures(tmp_path / "run")]
    assert names == ["original", "rtn", "quantized", "block_tuned", "end_to_end"]
    assert figures(tmp_path / "run")[-1]["text_kl"] < 0.5
    on_device(library, "test", quantizer, recipe, *run)
    assert (tmp_path / "run/test.json").exists()


def test_it_computes_what_a_cpu_computes(library: Path, recipe: list[str], finished_run: Path, tmp_path: Path) -> None:
    settings = ["--block_tuning.epochs", "0", "--end_to_end.steps", "0", "--trainer.precision", "32-true"]
    on_device(library, "fit", "gptq", recipe, "--run_dir", str(tmp_path / "fake"), *settings)
    own = [part.replace("llava_aqlm", "llava_gptq") for part in recipe]
    assert main(["fit", *own, *QUESTIONS, "--run_dir", str(tmp_path / "cpu"), *settings]) == 0
    for one, other in zip(figures(tmp_path / "fake"), figures(tmp_path / "cpu"), strict=True):
        assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-4)
