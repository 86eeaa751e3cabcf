"""What a user sees of each fault: the exit code, and at most three lines that name the thing and the way out."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from casp_pl.checkpoint import RunDirectory
from casp_pl.cli import main
from casp_pl.models.tiny import load_tiny

Fault = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def saved_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as an ordinary Hugging Face directory."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model, processor = load_tiny()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def said(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that has to end with this code; what it says on stderr."""
    capsys.readouterr()
    assert main(arguments) == code
    message = capsys.readouterr().err
    last = [line for line in message.splitlines() if not line.startswith("warning:")]
    assert 1 <= len(last) <= 3, message
    assert "Traceback" not in message
    return message


def llava(folder: Path, rows: list[dict[str, object]]) -> list[str]:
    """Options for LLaVA's JSON with an image folder."""
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "images").mkdir(exist_ok=True)
    options = ["--data.source", "LlavaJson", "--data.source.path", str(folder / "rows.json")]
    return [*options, "--data.source.image_folder", str(folder / "images")]


def conversation(name: str, question: str = "<image>\nWhat is it?", **more: object) -> dict[str, object]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A cat."}]
    return {"id": name, "image": f"{name}.png", "conversations": turns} | more


def no_conversation(folder: Path) -> list[str]:
    return llava(folder, [])


def few_conversations(folder: Path) -> list[str]:
    options = llava(folder, [conversation(f"row{number}") for number in range(3)])
    for number in range(3):
        Image.new("RGB", (20, 14)).save(folder / f"images/row{number}.png")
    return options


def broken_images(folder: Path) -> list[str]:
    options = llava(folder, [conversation(f"row{number}") for number in range(30)])
    for number in range(30):
        Image.new("RGB", (20, 14)).save(folder / f"images/row{number}.png")
    for number in range(30):
        path = folder / f"images/row{number}.png"
        path.write_bytes(path.read_bytes()[: (None, 40, 0)[number % 3]])
    return options


def marks_without_images(folder: Path) -> list[str]:
    return llava(folder, [conversation("good"), conversation("bad", "<image><image>\nWhich?")])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (no_conversation, ["20 image-text samples are wanted", "the source has 0"]),
        (few_conversations, ["20 image-text samples are wanted", "the source has 3"]),
        (broken_images, ["samples cannot be used (more than 5%)", "images/row", ".png"]),
        (marks_without_images, ["bad", "2 <image> marks", "1 images"]),
    ],
)
def test_bad_data_ends_with_3(
    fault: Fault, words: list[str], recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = said(["fit", *recipe, "--run_dir", str(tmp_path / "run"), *fault(tmp_path)], 3, capsys)
    for word in words:
        assert word in message


def test_a_broken_weight_ends_with_4_before_anything_is_written(
    recipe: list[str], saved_tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(saved_tiny, tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][0, :3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    arguments = ["--model.source", str(tmp_path / "model"), "--run_dir", str(tmp_path / "run")]
    message = said(["fit", *recipe, *arguments], 4, capsys)
    assert "layers.1.mlp.up_proj.weight: 3 of 4608 weights are NaN" in message
    assert not (tmp_path / "run").exists()


def test_places_that_cannot_be_written_end_with_5_before_the_model_is_read(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file/below"):
        message = said(["fit", *recipe, "--model.source", "no/model", "--run_dir", str(place)], 5, capsys)
        assert f"{tmp_path / 'file'} is a file" in message


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A directory that may not be written; root may write anywhere and is somebody else for the time of the test."""
    tmp_path.chmod(0o500)
    if os.getuid() != 0:
        yield tmp_path
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield tmp_path
    finally:
        os.setresuid(0, 0, 0)


def test_places_that_may_not_be_written_end_with_5_before_the_model_is_read(
    recipe: list[str], capsys: pytest.CaptureFixture[str], closed: Path
) -> None:
    for place in (Path("/no-such-runs/x"), closed / "no-such-runs" / "x"):
        message = said(["fit", *recipe, "--model.source", "no/model", "--run_dir", str(place)], 5, capsys)
        assert f"Cannot write {place}" in message


def test_a_plan_beyond_the_memory_is_refused_unless_overridden_and_a_used_directory_names_its_user(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fit", *recipe, "--data.batch_size", "100000000", "--run_dir", str(tmp_path / "run")]
    message = said(arguments, 5, capsys)
    assert "--override_memory" in message
    assert "data.batch_size" in message
    assert not (tmp_path / "run").exists()
    with RunDirectory.open(tmp_path / "run", {}):
        message = said([*arguments, "--override_memory"], 5, capsys)
    assert f"{tmp_path / 'run'} is in use by process {os.getpid()}" in message


def test_memory_is_checked_before_a_weight_is_loaded_as_plan_says(
    recipe: list[str],
    stored_tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise AssertionError("a weight is loaded")

    monkeypatch.setattr("transformers.LlavaForConditionalGeneration.from_pretrained", killed)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=200 << 20))
    options = [*recipe, "--model.source", str(stored_tiny), "--run_dir", str(tmp_path / "run")]
    assert "of memory" in said(["fit", *options], 5, capsys)
    assert main(["plan", *options, "--quick", "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert not any(stage["fits"] for stage in stages), "Python and torch alone take more"
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=64 << 30))
    assert "a weight is loaded" in said(["fit", *options], 1, capsys)


def test_a_broken_manifest_ends_with_6(recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunDirectory.open(tmp_path / "run", {}) as run:
        run.write_json("plan.json", {})
    (tmp_path / "run/manifest.json").write_text('{"version": 1, "version": 1, "fingerprint": {}, "artifacts": {}}')
    message = said(["fit", *recipe, "--run_dir", str(tmp_path / "run")], 6, capsys)
    assert "manifest.json" in message
    assert "'version' occurs twice" in message
    assert main(["verify", str(tmp_path / "run")]) == 6


def test_another_model_or_other_data_in_the_same_directory_end_with_2(
    recipe: list[str], saved_tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from casp_pl.cli import recipe_parsers, settings_from
    from casp_pl.pipeline.prepare import fingerprint, prepare

    rows = llava(tmp_path, [conversation(f"row{number}") for number in range(30)])
    for number in range(30):
        Image.new("RGB", (20, 14)).save(tmp_path / f"images/row{number}.png")
    shutil.copytree(saved_tiny, tmp_path / "model")
    options = [*recipe, *rows, "--model.source", str(tmp_path / "model"), "--data.fine_tuning_samples", "null"]
    parser = recipe_parsers()["fit"]
    settings = settings_from(parser, parser.parse_args(options))
    with RunDirectory.open(tmp_path / "run", fingerprint(settings, prepare(settings, digest=True))):
        pass
    command = ["fit", *options, "--run_dir", str(tmp_path / "run")]
    other = load_tiny(seed=1)[0]
    other.save_pretrained(tmp_path / "model")
    assert "made with other settings. model:" in said(command, 2, capsys)
    shutil.copytree(saved_tiny, tmp_path / "model", dirs_exist_ok=True)
    llava(tmp_path, [conversation(f"row{number}", "<image>\nWhat is that?") for number in range(30)])
    assert "made with other settings. data:" in said(command, 2, capsys)


def test_pickles_and_code_of_a_model_directory_are_never_executed(
    recipe: list[str], saved_tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(saved_tiny, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    torch.save(_Bomb(tmp_path / "executed"), folder / "pytorch_model.bin")
    (folder / "bomb.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "bomb.Config", "AutoModelForImageTextToText": "bomb.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["fit", *recipe, "--model.source", str(folder), "--run_dir", str(tmp_path / "run")]) != 0
    assert len(capsys.readouterr().err.splitlines()) <= 3
    assert not (tmp_path / "executed").exists()


class _Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.slow
def test_optional_packages_that_are_broken_are_replaced_and_named(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('no LLVM here')\n")
    (tmp_path / "fast_hadamard_transform.py").write_text("import fast_hadamard_transform_cuda\n")
    (tmp_path / "scipy.py").write_text("raise ImportError('no scipy here')\n")
    script = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from casp_pl.linalg import hadamard_extension
from casp_pl.quantizers import AQLMQuantizer, QuIPSharpQuantizer
hadamard_extension._TRIED = ("cpu",)  # it is tried on GPUs only, which a test cannot count on
weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
for quantizer in (AQLMQuantizer(), QuIPSharpQuantizer()):
    layer = quantizer.quantize(weight, torch.eye(64), bits=2, generator=torch.Generator().manual_seed(0))
    error = (layer.dequantize() - weight).square().mean() / weight.square().mean()
    assert error < 0.2, error
"""
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "numba does not run here (no LLVM here)" in done.stderr
    reason = "No module named 'fast_hadamard_transform_cuda'"
    assert f"fast_hadamard_transform is not used on cpu: {reason}" in done.stderr
