import json
import multiprocessing
import os
import threading

import pytest
import torch

from casp_pl.checkpoint import RunDirectory, verify
from casp_pl.checkpoint.manifest import Manifest
from casp_pl.errors import ConfigError, InputError, IntegrityError, ResourceError

FINGERPRINT = {"model": "tiny", "quantizer": {"bits": 2, "seed": 0}}
TENSORS = {"codes": torch.arange(64, dtype=torch.uint8), "scales": torch.rand(3, 1)}


def fill(path):
    with RunDirectory.open(path, FINGERPRINT) as run_directory:
        run_directory.write_json("table.json", {"a": 1})
        run_directory.write_tensors("parts/000.safetensors", TENSORS, {"loss": 0.5})


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def test_what_was_written_is_there_after_reopening(tmp_path):
    fill(tmp_path / "a" / "run")
    with RunDirectory.open(tmp_path / "a" / "run", FINGERPRINT) as again:
        assert again.has("table.json")
        assert again.read_json("table.json") == {"a": 1}
        tensors, metadata = again.read_tensors("parts/000.safetensors")
        assert metadata == {"loss": 0.5}
        assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
        assert not again.has("parts/001.safetensors")
        assert again.fingerprint == FINGERPRINT
    assert verify(tmp_path / "a" / "run") == []


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, os.remove])
def test_a_damaged_artifact_counts_as_absent_and_can_be_redone(tmp_path, caplog, damage):
    fill(tmp_path)
    damage(tmp_path / "parts/000.safetensors")
    (problem,) = verify(tmp_path)
    assert "000.safetensors" in problem
    with RunDirectory.open(tmp_path, FINGERPRINT) as run_directory:
        with pytest.raises(IntegrityError, match="000"):
            run_directory.read_tensors("parts/000.safetensors")
        assert not run_directory.has("parts/000.safetensors")
        assert "000.safetensors" in caplog.text
        assert run_directory.has("table.json")
        run_directory.write_tensors("parts/000.safetensors", TENSORS)
        assert run_directory.has("parts/000.safetensors")
    assert verify(tmp_path) == []


def test_directories_are_recorded_file_by_file(tmp_path):
    with RunDirectory.open(tmp_path, FINGERPRINT) as run_directory:
        for name in ("one", "two"):
            run_directory.path(f"model/{name}").write_text(name)
        assert not run_directory.has("model")
        run_directory.record("model")
        assert run_directory.has("model")
        run_directory.path("model/two").unlink()
        run_directory.record("model")
        assert run_directory.has("model")
        truncate(tmp_path / "model" / "one")
        assert not run_directory.has("model")
        with pytest.raises(IntegrityError, match="cannot be recorded"):
            run_directory.record("absent")
        with pytest.raises(IntegrityError, match="not in the manifest"):
            run_directory.read_json("absent")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", ""])
def test_names_stay_inside(tmp_path, name):
    with (
        RunDirectory.open(tmp_path, FINGERPRINT) as run_directory,
        pytest.raises(ValueError, match="not a path inside"),
    ):
        run_directory.path(name)


@pytest.mark.parametrize(
    ("now", "key"),
    [
        ({"model": "tiny", "quantizer": {"bits": 3, "seed": 0}}, r"quantizer\.bits: 2 there, 3 now"),
        ({"model": "tiny", "quantizer": {"bits": 2}}, r"quantizer\.seed: 0 there, \"absent\" now"),
        ({"model": "x" * 500, "quantizer": {"bits": 2, "seed": 0}}, r"model: \"tiny\" there"),
    ],
)
def test_another_configuration_is_refused_by_key(tmp_path, now, key):
    fill(tmp_path)
    with pytest.raises(ConfigError, match=key) as caught, RunDirectory.open(tmp_path, now):
        pass
    assert str(caught.value).count("\n") < 3
    assert len(str(caught.value)) < 400
    assert verify(tmp_path) == []


DIFFERING = """
import sys
import torch.distributed as dist
from casp_pl.checkpoint import RunDirectory
from casp_pl.errors import ConfigError
from casp_pl.processes import process_rank

dist.init_process_group("gloo")
try:
    with RunDirectory.open(sys.argv[1], {"data": {"images": 7 + process_rank()}}):
        sys.exit("nobody noticed")
except ConfigError as error:
    assert str(error).startswith("Process 1 is at other work. data.images: 7 in the first process, 8 in that one")
    assert str(error).count("\\n") == 1
dist.destroy_process_group()  # else gloo's threads may still run when Python ends, which aborts it
"""


def test_processes_at_different_work_are_refused(tmp_path, start_together, finish_together):
    finish_together(start_together(["-c", DIFFERING, str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()


def test_fingerprints_compare_as_json(tmp_path):
    with RunDirectory.open(tmp_path, {"levels": (2, 3), "empty": {}}):
        pass
    with RunDirectory.open(tmp_path, {"empty": {}, "levels": [2, 3]}) as run:
        assert run.fingerprint == {"levels": [2, 3], "empty": {}}


def break_manifest(path, text):
    (path / "manifest.json").write_text(text)


def with_entry(name, entry):
    return json.dumps({"version": 1, "fingerprint": FINGERPRINT, "artifacts": {name: entry}})


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{}",
        "[]",
        '{"version": 1, "version": 1, "fingerprint": {}, "artifacts": {}}',
        '{"version": 9, "fingerprint": {}, "artifacts": {}}',
        '{"version": 1, "fingerprint": [], "artifacts": {}}',
        with_entry("../x", {"sha256": "0" * 64, "bytes": 1}),
        with_entry("/etc/passwd", {"sha256": "0" * 64, "bytes": 1}),
        with_entry("x", {"sha256": "0" * 63, "bytes": 1}),
        with_entry("x", {"sha256": "0" * 64, "bytes": -1}),
        with_entry("x", {"sha256": "0" * 64}),
        with_entry("x", 5),
    ],
)
def test_a_missing_or_broken_manifest_is_an_integrity_error(tmp_path, text):
    fill(tmp_path)
    if text is None:
        (tmp_path / "manifest.json").unlink()
    else:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"manifest\.json"), RunDirectory.open(tmp_path, FINGERPRINT):
        pass
    assert len(verify(tmp_path)) == 1


def test_config_and_log_may_lie_there_before(tmp_path):
    (tmp_path / "config.yaml").write_text("x: 1")
    (tmp_path / "tensorboard").mkdir()
    fill(tmp_path)
    with pytest.raises(InputError):
        verify(tmp_path / "absent")


def test_the_second_run_is_refused_and_names_the_first(tmp_path):
    with (
        RunDirectory.open(tmp_path, FINGERPRINT),
        pytest.raises(ResourceError, match=f"in use by process {os.getpid()}"),
        RunDirectory.open(tmp_path, FINGERPRINT),
    ):
        pass
    fill(tmp_path)


def hold_until_killed(path, ready):
    with RunDirectory.open(path, FINGERPRINT):
        ready.set()
        threading.Event().wait()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=hold_until_killed, args=(tmp_path, ready))
    child.start()
    assert ready.wait(30)
    with pytest.raises(ResourceError, match=f"process {child.pid}"), RunDirectory.open(tmp_path, FINGERPRINT):
        pass
    child.kill()
    child.join()
    fill(tmp_path)


def test_readers_see_what_the_writer_records_and_cannot_write(tmp_path):
    with RunDirectory.open(tmp_path, FINGERPRINT) as writer:
        reader = RunDirectory.read_only(tmp_path)
        assert not reader.has("table.json")
        writer.write_json("table.json", [1])
        assert reader.has("table.json")
        assert reader.read_json("table.json") == [1]
        with pytest.raises(RuntimeError, match="reading only"):
            reader.write_json("table.json", [2])
        flip_a_bit(tmp_path / "table.json")
        assert not reader.has("table.json")
        assert "table.json" in Manifest.load(tmp_path).artifacts


def test_sigkill_between_file_and_entry_leads_to_the_same_file(tmp_path, killed_in):
    fill(tmp_path / "undisturbed")
    with RunDirectory.open(tmp_path / "killed", FINGERPRINT):
        pass
    killed_in(Manifest, "save", fill, tmp_path / "killed")
    assert (tmp_path / "killed" / "table.json").exists()
    with RunDirectory.open(tmp_path / "killed", FINGERPRINT) as again:
        assert not again.has("table.json")
    fill(tmp_path / "killed")
    names = ("table.json", "parts/000.safetensors", "manifest.json")
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_leftovers_of_killed_writes_are_removed(tmp_path, killed_in):
    fill(tmp_path)
    killed_in(os, "replace", fill, tmp_path)
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / ".tmp-x-12345678").touch()
    (tmp_path / "exports/.tmp-gptq-12345678/inside").mkdir(parents=True)  # of an export that was killed
    assert list(tmp_path.rglob(".tmp*"))
    fill(tmp_path)
    assert not list(tmp_path.rglob(".tmp*"))


def test_an_output_that_is_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ResourceError, match="Cannot create"), RunDirectory.open(path, FINGERPRINT):
            pass
