"""One finished fit of the tiny model, shared by all tests."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from casp_pl.cli import main
from casp_pl.models.tiny import load_tiny

ROOT = Path(__file__).parents[1]
RECIPE = ["--config", str(ROOT / "configs/llava_aqlm.yaml"), "--config", str(ROOT / "configs/models/tiny.yaml")]


@pytest.fixture(scope="session")
def recipe() -> list[str]:
    """Arguments of the recipe on the tiny model."""
    return RECIPE


@pytest.fixture(scope="session")
def stored_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a Hugging Face directory of many small files."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model, processor = load_tiny()
    model.save_pretrained(folder, max_shard_size="60KB")
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a complete run."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["fit", *RECIPE, "--run_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def tensor_digests() -> Callable[[Path], dict[str, str]]:
    """Run directory -> SHA-256 of every tensor of its model and its blocks."""

    def digests(folder: Path) -> dict[str, str]:
        # the notes beside the tensors hold wall times, which differ
        files = sorted((folder / "model").glob("*.safetensors")) + sorted(folder.glob("*/[0-9]*.safetensors"))
        return {
            f"{path.relative_to(folder)}:{name}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
            for path in files
            for name, tensor in load_file(path).items()
        }

    return digests
