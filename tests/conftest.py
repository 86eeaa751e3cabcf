"""What many tests share: one finished fit of the tiny model, and processes that work together."""

import hashlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from casp_pl.cli import main
from casp_pl.models.tiny import load_tiny

ROOT = Path(__file__).parents[1]
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
RECIPE = ["--config", str(ROOT / "configs/llava_aqlm.yaml"), "--config", str(ROOT / "configs/models/tiny.yaml")]

if WORKERS > 1:  # processes of pytest that run at once share the cores, and so do the processes that their tests start
    torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    os.environ.pop("COLUMNS", None)  # of the terminal that they report to, which no command under test prints on


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
def start_together() -> Callable[..., list[subprocess.Popen[bytes]]]:
    """(arguments of Python, number of processes) -> the processes, which know each other as torchrun's do."""

    def start(arguments: list[str], count: int = 2) -> list[subprocess.Popen[bytes]]:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        known = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0, "MASTER_PORT": port}
        known |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "test", "GLOO_SOCKET_IFNAME": "lo"}
        known |= {"OMP_NUM_THREADS": 1, "NUMBA_NUM_THREADS": 1}
        environments = [known | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
        return [
            subprocess.Popen(
                [sys.executable, *arguments],
                env=os.environ | {name: str(value) for name, value in environment.items()},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            for environment in environments
        ]

    return start


@pytest.fixture(scope="session")
def finish_together() -> Callable[..., None]:
    """Waits for all of them; what one says when it fails is in the assertion."""

    def finish(processes: list[subprocess.Popen[bytes]], timeout: float = 300) -> None:
        try:
            for process in processes:
                _, errors = process.communicate(timeout=timeout)
                assert process.returncode == 0, errors.decode()[-3000:]
        finally:
            for process in processes:
                process.kill()
                process.communicate()

    return finish


def _kill_self(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="session")
def killed_in() -> Callable[..., None]:
    """killed_in(owner, name, function, *arguments): run in a child that is killed where it calls `owner.name`."""

    def run(owner: object, name: str, function: Callable[..., object], *arguments: object) -> None:
        def child() -> None:
            setattr(owner, name, _kill_self)
            function(*arguments)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL

    return run


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


def _forget_tables() -> None:
    """Those of kernels and transforms, and compiled loops: the next use makes and tries them again."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("casp_pl.kernels", "casp_pl.linalg")):
            for value in list(vars(module).values()):
                getattr(value, "cache_clear", lambda: None)()


@pytest.fixture(scope="session")
def under_default() -> Callable[[torch.dtype | torch.device], AbstractContextManager[None]]:
    """A context with another default dtype or device of torch, in which tables and loops are made anew."""

    @contextmanager
    def default(kind: torch.dtype | torch.device) -> Iterator[None]:
        _forget_tables()
        try:
            if isinstance(kind, torch.device):
                with kind:
                    yield
            else:
                torch.set_default_dtype(kind)
                yield
        finally:
            torch.set_default_dtype(torch.float32)
            _forget_tables()

    return default


@pytest.fixture
def assert_race_free() -> Iterator[Callable[..., None]]:
    """assert_race_free(compute, tolerance=0): fails unless 400 calls with two threads return the same bits.

    They are those of one thread, but for a tolerance relative to the largest value, where a BLAS has a part in them.
    """
    numba = pytest.importorskip("numba", reason="compiled loops need numba, the extra `cpu`")
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("numba has one thread here, and a race needs two: NUMBA_NUM_THREADS=2 asks for them")
    before = torch.get_num_threads()

    def check(compute: Callable[[], Sequence[Tensor]], tolerance: float = 0) -> None:
        torch.set_num_threads(1)
        alone = compute()
        assert numba.get_num_threads() == 1
        torch.set_num_threads(2)
        first = compute()
        assert numba.get_num_threads() == 2, "no compiled loop ran"
        for ours, theirs in zip(first, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))
        for call in range(400):
            assert all(map(torch.equal, compute(), first)), f"call {call} differs"

    yield check
    torch.set_num_threads(before)
