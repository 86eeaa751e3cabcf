"""Every kind of damage in every layout: found, whatever hashes were made anew after it."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from casp_pl.checkpoint import save_compressed, save_streamed, verify
from casp_pl.checkpoint.manifest import Manifest, describe
from casp_pl.checkpoint.model_directory import unsafe_files
from casp_pl.export import EXPORT_FORMATS, export_model
from casp_pl.layers import AdditiveLinear
from casp_pl.models.adapter import adapt
from casp_pl.models.tiny import load_tiny
from casp_pl.pipeline.commands import verify as verify_command
from casp_pl.quantizers import GPTQQuantizer


def _additive(weight):
    rows, columns = weight.shape
    layer = AdditiveLinear.from_codes(
        torch.randint(16, (rows, columns // 8, 2)), torch.randn(2, 16, 8), torch.rand(rows, 1), in_features=columns
    )
    layer.round_to_storage()
    return layer


def _uniform(weight, bits=4):
    spread = torch.diag(torch.rand(weight.shape[1]) + 0.1)
    return GPTQQuantizer(group_size=16).quantize(weight.detach(), spread, bits=bits)


def _mixed(weight):
    return _uniform(weight, bits=4 if len(weight) % 3 else 2)


def _model(make):
    torch.manual_seed(0)
    model, processor = load_tiny()
    adapter = adapt(model)
    for block in adapter.blocks:
        for name in adapter.linear_names:
            block.set_submodule(name, make(block.get_submodule(name).weight))
    return model, processor, adapter


LAYOUTS = ("streamed", *EXPORT_FORMATS)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Layout -> a directory in it, of a tiny LLaVA."""
    folder = tmp_path_factory.mktemp("layouts")
    model, processor, adapter = _model(_mixed)
    save_compressed(model, processor, folder / "casp", card="")
    save_streamed(adapter, list(adapter.blocks), processor, folder / "streamed", card="")
    sources = {"aqlm": _additive, "gptq": _uniform}  # these hold one level
    for layout, make in sources.items():
        save_compressed(*_model(make)[:2], folder / f"for_{layout}", card="")
    for layout in set(EXPORT_FORMATS) - {"casp"}:
        export_model(folder / (f"for_{layout}" if layout in sources else "casp"), folder / layout, layout)
    return folder


@pytest.fixture
def copy(written, tmp_path):
    return lambda layout: Path(shutil.copytree(written / layout, tmp_path / "model"))


def change(directory, word, edit):
    """Edit the first tensor whose name has the word in it, and hash everything anew; `edit` gives None to drop it."""
    for path in sorted(directory.glob("*.safetensors")):
        tensors = load_file(path)
        names = [name for name in sorted(tensors) if word in name]
        if names:
            tensors[names[0]] = edit(tensors[names[0]].clone())
            kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
            save_file(kept, path, metadata={"format": "pt"})
            return seal(directory, names[0])
    raise AssertionError(f"no tensor has {word} in its name")


def seal(directory, name=None):
    manifest = Manifest()
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json"):
        manifest.artifacts[path.relative_to(directory).as_posix()] = describe(path)
    manifest.save(directory)
    return name


def filled(value):
    def edit(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return edit


CODES = {
    "casp": "up_proj.codes", "streamed": "up_proj.codes", "dense": "up_proj.weight", "aqlm": "up_proj.codes",
    "gptq": "up_proj.qweight", "gptq_v2": "up_proj.qweight",
}  # fmt: skip
SCALES = CODES | dict.fromkeys(("casp", "streamed", "aqlm", "gptq", "gptq_v2"), "up_proj.scales")
DAMAGES = {
    "cut": (CODES, lambda tensor: tensor[:-1], "instead of"),
    "type": (CODES, lambda tensor: tensor.to(torch.int64), "I64"),
    "absent": (CODES, lambda _: None, "is missing"),
    "NaN": (SCALES, filled(float("nan")), "holds 1 values that are NaN"),
    "infinity": (SCALES, filled(float("inf")), "holds 1 values that are NaN or infinite"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sound_directory_of_every_layout_is_whole(written, layout, capsys):
    assert verify(written / layout) == []
    assert verify_command(written / layout) == 0


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_tensors_are_named_though_the_hashes_are_right(copy, layout, damage):
    words, edit, message = DAMAGES[damage]
    directory = copy(layout)
    name = change(directory, words[layout], edit)
    found = [problem for problem in verify(directory) if "index.json" not in problem]
    assert len(found) == 1
    assert name in found[0]
    assert message in found[0]


@pytest.mark.parametrize(
    ("layout", "word", "value"),
    [
        ("casp", "up_proj.column_groups", 255), ("streamed", "up_proj.column_groups", 255),
        ("gptq", "up_proj.g_idx", 99), ("gptq_v2", "up_proj.g_idx", -1), ("aqlm", "up_proj.codes", 8),
    ],
)  # fmt: skip
def test_codes_and_groups_out_of_range_are_named(copy, layout, word, value):
    directory = copy(layout)
    name = change(directory, word, filled(value))
    (problem,) = verify(directory)
    assert name in problem
    assert "broken" in problem


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_of_which_the_config_says_nothing_is_named(copy, layout):
    directory = copy(layout)
    path = sorted(directory.glob("*.safetensors"))[0]
    save_file(load_file(path) | {"stranger": torch.zeros(1)}, path, metadata={"format": "pt"})
    seal(directory)
    assert any("stranger is unknown" in problem for problem in verify(directory))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_links_outside_and_pickles_at_any_depth_are_refused(copy, layout, capsys):
    directory = copy(layout)
    path = sorted(directory.glob("*.safetensors"))[0]
    path.rename(directory.parent / "outside.safetensors")
    path.symlink_to("../outside.safetensors")
    (directory / "sub").mkdir()
    (directory / "sub/evil.pkl").write_bytes(b"\x80\x04.")
    (directory / "sub/evil.txt").write_bytes(b"\x80\x04.")
    torch.save({"a": torch.ones(2)}, directory / "sub/saved.dat")
    with zipfile.ZipFile(directory / "sub/kept.dat", "w") as archive:
        archive.writestr("words.txt", "no harm")
    assert verify_command(directory) == 6
    said = " ".join(capsys.readouterr().out.split())  # long paths are wrapped
    for name in (f"{path.name} lies outside", "evil.pkl is a pickle", "evil.txt is a pickle", "saved.dat is a pickle"):
        assert name in said
    assert "kept.dat is a pickle" not in said


@pytest.mark.parametrize("damage", [(b"PK\x01\x02", b"PK\x01\x03"), (b"PK\x05\x06", b"PK\x05\x07")])
def test_an_archive_that_cannot_be_listed_may_hold_pickles(tmp_path, damage):
    torch.save({"a": torch.ones(2)}, tmp_path / "saved.dat")
    (tmp_path / "saved.dat").write_bytes((tmp_path / "saved.dat").read_bytes().replace(*damage))
    (problem,) = unsafe_files(tmp_path)
    assert "saved.dat is a pickle" in problem


@pytest.mark.parametrize(
    ("start", "refused"),
    [
        (b"\x80\x02\0\0\0\0\0\0{", False),  # safetensors whose header takes 640 bytes
        (b"\x80\x02\0\0\0\0\0\0(", True),
        (b"\x80\x02}q\0.\0\0{", True),  # no file is so long
    ],
)
def test_a_header_is_not_taken_for_a_pickle(tmp_path, start, refused):
    (tmp_path / "model.safetensors").write_bytes(start + b" " * 700)
    assert bool(unsafe_files(tmp_path)) == refused


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flipped_bits_are_found_by_the_hash(copy, layout):
    directory = copy(layout)
    path = sorted(directory.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert any(f"{path} has another SHA-256" in problem for problem in verify(directory))


def test_snapshots_of_the_hub_link_to_their_blobs(written, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0f", tmp_path / "models--a--b/blobs"
    shutil.copytree(written / "gptq", snapshot)
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert verify(snapshot) == []


def test_an_index_that_tells_other_places_is_named(copy):
    directory = copy("streamed")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(name for name, file in index["weight_map"].items() if file.startswith("model-00002"))
    index["weight_map"][name] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    seal(directory)
    assert [problem for problem in verify(directory) if "index.json" in problem] != []


def change_block(run, word, edit):
    """As `change`, of the first block of a run: notes stay, the hash is made anew."""
    from casp_pl.checkpoint.atomic import METADATA_KEY, write_safetensors
    from casp_pl.models.weight_files import weight_file

    path = run / "blocks/000.safetensors"
    with weight_file(path) as reader:
        metadata = json.loads(reader.metadata()[METADATA_KEY])
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if word in name)
    tensors[name] = edit(tensors[name].clone())
    write_safetensors(path, {name: value for name, value in tensors.items() if value is not None}, metadata)
    manifest = Manifest.load(run)
    manifest.artifacts["blocks/000.safetensors"] = describe(path)
    manifest.save(run)
    return name


@pytest.mark.parametrize(
    ("word", "edit", "message"),
    [
        ("up_proj.codes", lambda tensor: tensor[:-1], "instead of"),
        ("up_proj.codes", lambda _: None, "is missing"),
        ("up_proj.scales", filled(float("nan")), "NaN"),
        ("layernorm", filled(float("nan")), "NaN"),
    ],
)
def test_damaged_blocks_of_a_run_are_named(finished_run, tmp_path, word, edit, message):
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    name = change_block(run, word, edit)
    (problem,) = verify(run)
    assert f"blocks/000.safetensors: {name}" in problem
    assert message in problem


@pytest.mark.parametrize(("low_rank", "key"), [(True, "rank"), (True, "bits"), (False, "bits")])
def test_a_block_that_is_not_what_was_planned_is_named(low_rank, key, finished_run, tmp_path):
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    plan = json.loads((run / "plan.json").read_text())
    changed = next(entry for entry in plan["modules"] if (entry["rank"] is not None) == low_rank)
    changed[key] += 1
    if low_rank and key == "bits":
        changed["factor_bits"] += 1
    (run / "plan.json").write_text(json.dumps(plan))
    manifest = Manifest.load(run)
    manifest.artifacts["plan.json"] = describe(run / "plan.json")
    manifest.save(run)
    assert any("as in plan.json" in problem for problem in verify(run))


def test_what_is_unsafe_in_a_run_is_found_at_any_depth(finished_run, tmp_path):
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (run / "model/deep/er").mkdir(parents=True)
    (run / "model/deep/er/x.pt").write_bytes(b"")
    os.symlink("/", run / "model/deep/root")
    os.symlink("loop", run / "model/deep/loop")
    found = verify(run)
    assert any("x.pt is a pickle" in problem for problem in found)
    assert any("deep/root lies outside" in problem for problem in found)
