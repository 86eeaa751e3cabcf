import errno
import json
import os
import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from casp_pl.checkpoint import (
    read_json,
    read_safetensors,
    sha256_of,
    write_bytes,
    write_json,
    write_safetensors,
    write_text,
)
from casp_pl.checkpoint.atomic import make_directory, remove_leftovers
from casp_pl.errors import IntegrityError, ResourceError

TENSORS = {
    "codes": torch.arange(40, dtype=torch.uint8),
    "scales": torch.linspace(-1, 1, 7).view(7, 1),
    "strided": torch.arange(12.0).view(3, 4).t(),
}
WRITERS = {
    "bytes": lambda path: write_bytes(path, bytes(100_000)),
    "text": lambda path: write_text(path, "x" * 100_000),
    "json": lambda path: write_json(path, ["x" * 100] * 1000),
    "tensors": lambda path: write_safetensors(path, {"x": torch.zeros(25_000)}),
}


@contextmanager
def largest_file(size):
    """A real full disk for this process: the kernel refuses to let a file grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_tensors_and_metadata_come_back(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, TENSORS, {"loss": 0.5, "bits": [2, 3]})
    tensors, metadata = read_safetensors(path)
    assert metadata == {"loss": 0.5, "bits": [2, 3]}
    assert tensors.keys() == load_file(path).keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype
    assert path.stat().st_mode == _plain_mode(tmp_path)


def _plain_mode(directory):
    (directory / "plain").touch()
    return (directory / "plain").stat().st_mode


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    metadata = {f"key{number}": number for number in range(20)}
    hashes = set()
    for number in range(5):
        write_safetensors(tmp_path / f"{number}", dict(sorted(TENSORS.items(), reverse=number % 2 == 1)), metadata)
        hashes.add(sha256_of(tmp_path / f"{number}"))
    assert len(hashes) == 1


def test_json_is_sorted_and_strict(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"b": [1.5, None], "a": "text"})
    assert path.read_text().index('"a"') < path.read_text().index('"b"')
    assert read_json(path) == json.loads(path.read_text()) == {"a": "text", "b": [1.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    assert read_json(path) == {"a": "text", "b": [1.5, None]}


@pytest.mark.parametrize("text", ["", "{", '{"a": 1, "a": 2}', "[NaN]", "[" * 100_000, "\x00"])
def test_broken_json_is_an_integrity_error(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(IntegrityError, match=r"x\.json"):
        read_json(path)
    with pytest.raises(IntegrityError, match="missing"):
        read_json(tmp_path / "absent")


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\xff\xff\xff\x7f\x00\x00\x00\x00{}", b"pickle" * 40])
def test_broken_safetensors_are_an_integrity_error(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"x\.safetensors"):
        read_safetensors(path)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, kind):
    path = tmp_path / "file"
    path.write_text("old")
    with (
        largest_file(30_000),
        pytest.raises(ResourceError, match="No space left for .*file .1[0-9]{5} bytes") as caught,
    ):
        WRITERS[kind](path)
    assert str(caught.value).count("\n") < 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
    WRITERS[kind](path)
    assert path.stat().st_size >= 100_000


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_sigkill_inside_a_write_leaves_the_old_file(tmp_path, killed_in, kind, moment):
    path = tmp_path / "file"
    path.write_text("old")
    killed_in(os, moment, WRITERS[kind], path)
    assert path.read_text() == "old"
    (leftover,) = remove_leftovers(tmp_path)
    assert leftover.startswith(".tmp")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_leftovers_of_one_file_only(tmp_path):
    for name in (".tmp-a-12345678", ".tmp-a-b-12345678", "a", ".tmpABC"):
        (tmp_path / name).mkdir()
    assert remove_leftovers(tmp_path, "a") == [".tmp-a-12345678"]
    assert remove_leftovers(tmp_path) == [".tmp-a-b-12345678", ".tmpABC"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="Cannot write"):
        write_text(tmp_path / "file" / "below", "x")
    with pytest.raises(ResourceError, match="Cannot write"):
        write_safetensors(tmp_path / "absent" / "x", TENSORS)

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ResourceError, match="Read-only"):
        write_text(tmp_path / "x", "x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_nothing_goes_through_tmpdir(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    write_safetensors(tmp_path / "x", TENSORS)
    write_text(tmp_path / "y", "y")
    assert (tmp_path / "y").read_text() == "y"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x", "y"]


def test_new_directories_are_synced_into_their_parents(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    make_directory(tmp_path / "a" / "b" / "c")
    assert sorted(synced) == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    synced.clear()
    make_directory(tmp_path / "a" / "b" / "d")
    assert synced == [str(tmp_path / "a" / "b")]
    synced.clear()
    make_directory(tmp_path / "a")
    assert synced == []
