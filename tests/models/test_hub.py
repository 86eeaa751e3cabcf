"""Models and data sets by their name on a hub, in fresh processes: a server on this machine speaks its API."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from casp_pl.cli import main
from casp_pl.models.families import write_family

ROOT = Path(__file__).parents[2]
NAME = "org/tiny-llava"
FEW = ["--data.samples", "8", "--data.fine_tuning_samples", "8", "--evaluation.questions", "4"]
QUICK = ["--baseline", "null", "--block_tuning.epochs", "0", "--end_to_end.steps", "0"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hub holds: two revisions of a model, with files that nobody should fetch, and a data set."""
    root = tmp_path_factory.mktemp("hub")
    for seed, revision in enumerate(("main", "v1")):
        folder = root / "models" / NAME / revision
        write_family("LlavaForConditionalGeneration", folder, seed=seed)
        for unwanted in ("pytorch_model.bin", "evil.py", "README.md"):
            (folder / unwanted).write_text("raise SystemExit('executed')")
    texts = root / "datasets" / "org" / "texts" / "main"
    texts.mkdir(parents=True)
    rows = [json.dumps({"text": f"This is sentence number {number} of a text. " * 40}) for number in range(9)]
    (texts / "train.jsonl").write_text("\n".join(rows[:6]))
    (texts / "test.jsonl").write_text("\n".join(rows[6:]))
    return root


@pytest.fixture
def run_with_hub(hub: Path, tmp_path: Path) -> Iterator[Callable[[list[str]], list[str]]]:
    """Runs a command with an empty cache beside the hub and gives the hub's log of it."""
    script = [sys.executable, str(ROOT / "tests/hub_server.py"), str(hub)]
    log = tmp_path / "requests"
    with log.open("w") as out, subprocess.Popen(script, stdout=subprocess.PIPE, stderr=out, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        known = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "cache")}

        def run(arguments: list[str]) -> list[str]:
            before = len(log.read_text().splitlines())
            command = [sys.executable, "-m", "casp_pl", *arguments]
            done = subprocess.run(command, env=known, cwd=ROOT, capture_output=True, text=True, timeout=500)
            assert done.returncode == 0, done.stderr
            return log.read_text().splitlines()[before:]

        yield run
        server.kill()


def _fetched(requests: list[str]) -> set[str]:
    """Names of the files that were asked for, whole or in part."""
    return {line.split()[1].rsplit("/", 1)[1] for line in requests if line.startswith("GET") and "/resolve/" in line}


@pytest.mark.slow
def test_plan_and_fit_from_the_hub(run_with_hub: Callable[[list[str]], list[str]], hub: Path, tmp_path: Path) -> None:
    configs = [f"--config={ROOT}/configs/{name}.yaml" for name in ("llava_gptq", "models/tiny")]
    source = ["--model.source", NAME, "--model.revision", "v1"]
    texts = ["--data.text_source", "HuggingFaceText", "--data.text_source.name", "org/texts"]
    recipe = [*configs, *source, *texts, *FEW, *QUICK, "--run_dir", str(tmp_path / "run")]
    planned = run_with_hub(["plan", "--quick", *recipe])
    weights = [line for line in planned if line.startswith("GET") and "model.safetensors" in line]
    assert [line.split()[2] for line in weights] == ["bytes=0-100000"], "its header, no more"
    fitted = run_with_hub(["fit", *recipe])
    wanted = {path.name for path in (hub / "models" / NAME / "v1").iterdir() if path.suffix in (".json", ".jinja")}
    assert _fetched(planned) == {*wanted, "model.safetensors", "train.jsonl", "test.jsonl"}
    assert _fetched(fitted) == {"model.safetensors"}, "the rest lies in the caches"
    assert f"`{NAME}@v1`, compressed" in (tmp_path / "run/model/README.md").read_text()
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["model"].startswith(f"{NAME}@v1 ")
    kept = load_file(tmp_path / "run/model/model.safetensors")["multi_modal_projector.linear_1.weight"]
    for revision, same in (("v1", True), ("main", False)):
        original = load_file(hub / "models" / NAME / revision / "model.safetensors")
        assert (kept.float() == original["multi_modal_projector.linear_1.weight"].float()).all() == same
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["fingerprint"]["recipe"]["model.revision"] == "v1"


def test_a_revision_belongs_to_a_hub_name(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *recipe, "--model.revision", "v1"]) == 2
    assert "model.revision: 'tiny' is no hub name" in capsys.readouterr().err
