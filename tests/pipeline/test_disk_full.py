"""A disk that is really full: a small file system where one can be mounted, else a limit on the size of files."""

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from casp_pl.cli import main

Grow = Callable[[], None]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Grow]]:
    """A place that a tiny run does not fit in, if possible on another file system than TMPDIR, and what makes room."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(place)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        try:
            yield place, lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True) and None
        finally:
            subprocess.run(["umount", "--lazy", str(place)], check=True)  # the log of the failed run is still open
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        yield place, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_a_run_on_a_full_disk_goes_on_once_there_is_room(
    small_disk: tuple[Path, Grow],
    recipe: list[str],
    finished_run: Path,
    tensor_digests: Callable[[Path], dict[str, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    place, grow = small_disk
    command = ["fit", *recipe, "--run_dir", str(place / "run")]
    capsys.readouterr()
    assert main(command) == 5
    message = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
    assert len(message) <= 3
    assert "No space left for" in message[0]
    assert str(place / "run") in message[0]
    assert not list(place.rglob(".tmp*"))
    grow()
    assert main(command) == 0
    assert main(["verify", str(place / "run")]) == 0
    assert tensor_digests(place / "run") == tensor_digests(finished_run)
