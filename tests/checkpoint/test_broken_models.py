import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from casp_pl.checkpoint import load_compressed, verify
from casp_pl.errors import InputError, IntegrityError
from casp_pl.kernels.additive import dequantize_additive_reference
from casp_pl.layers import AdditiveLinear, UniformLinear


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_missing_or_foreign_models_are_an_input_error(tmp_path):
    with pytest.raises(InputError):
        load_compressed(tmp_path / "absent")
    with pytest.raises(InputError):
        load_compressed(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="none that casp_pl compressed"):
        load_compressed(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(IntegrityError):
        load_compressed(tmp_path)


def flip_a_bit(directory):
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def cut(directory):
    os.truncate(directory / "model.safetensors", 5000)


def pickle_beside(directory):
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def index_outside(directory):
    (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def index_absolute(directory):
    index_outside(directory)
    path = directory / "model.safetensors.index.json"
    edit(path, lambda index: index["weight_map"].update({"lm_head.weight": "/etc/x.safetensors"}))


def no_weights(directory):
    (directory / "model.safetensors").unlink()


def change_config(change):
    def damage(directory):
        edit(directory / "config.json", lambda config: change(config["quantization_config"]))
        (directory / "manifest.json").unlink()

    return damage


def change_tensors(change):
    def damage(directory):
        path = directory / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})
        (directory / "manifest.json").unlink()

    return damage


def header_of(size):
    def damage(directory):
        (directory / "model.safetensors").write_bytes(size.to_bytes(8, "little") + b"{}")
        (directory / "manifest.json").unlink()

    return damage


def lying_shape(directory):
    """The header gives a tensor more rows than there are bytes."""
    path = directory / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[CODES]["shape"] = [10 * header[CODES]["shape"][0]]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    (directory / "manifest.json").unlink()


def wider_codes(tensors):
    """Numbers that no byte holds, where bytes belong."""
    return tensors | {CODES: tensors[CODES].to(torch.int32) + 1000}


UP = "model.language_model.layers.0.mlp.up_proj"
CODES = "language_model.model.layers.0.mlp.up_proj.codes"
DAMAGES = {
    "header of a terabyte": header_of(1 << 40),
    "header beyond the file": header_of(1 << 20),
    "lying shape": lying_shape,
    "too few codes": change_tensors(lambda tensors: tensors | {CODES: tensors[CODES][:-1].clone()}),
    "codes out of range": change_tensors(wider_codes),
    "negative codes": change_tensors(lambda tensors: tensors | {CODES: -tensors[CODES].to(torch.int16) - 1}),
    "codes that are no integers": change_tensors(lambda tensors: tensors | {CODES: tensors[CODES].float()}),
    "no codes": change_tensors(lambda tensors: {name: value for name, value in tensors.items() if name != CODES}),
    "bit": flip_a_bit,
    "cut": cut,
    "pickle": pickle_beside,
    "outside": index_outside,
    "absolute": index_absolute,
    "no weights": no_weights,
    "version": change_config(lambda config: config.update(version=2)),
    "key": change_config(lambda config: config.update(extra=1)),
    "kind": change_config(lambda config: config["modules"][UP].update(kind="magic")),
    "shape": change_config(lambda config: config["modules"][UP].update(out_features=10**15)),
    "bits": change_config(lambda config: config["modules"][UP].update(bits=8)),
    "group": change_config(lambda config: config["modules"][UP].update(group_size=0)),
    "name": change_config(lambda config: config["modules"].update({"model.nothing": config["modules"].pop(UP)})),
    "no linear": change_config(lambda config: config["modules"].update({"model": config["modules"].pop(UP)})),
    "left out": change_config(lambda config: config["modules"].pop(UP)),
    "list": change_config(lambda config: config.update(modules=[])),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_broken_model_is_an_integrity_error(copy, kind):
    DAMAGES[kind](copy)
    with pytest.raises(IntegrityError) as caught:
        load_compressed(copy)
    assert str(caught.value).count("\n") < 3
    assert verify(copy) != []


def only_a_pickle(directory):
    (directory / "model.safetensors").unlink()
    pickle_beside(directory)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(index_outside, "refused"), (only_a_pickle, "refused"), (change_tensors(wider_codes), "codes are bytes")],
    ids=["outside", "pickle", "codes"],
)
def test_from_pretrained_refuses_unsafe_weights_as_well(copy, damage, words):
    from transformers import AutoModelForImageTextToText

    damage(copy)
    with pytest.raises(IntegrityError, match=words):
        AutoModelForImageTextToText.from_pretrained(copy)


def test_code_that_comes_along_is_ignored(copy, caplog):
    edit(copy / "config.json", lambda config: config.update(auto_map={"AutoConfig": "evil.Config"}))
    (copy / "evil.py").write_text("raise SystemExit('executed')")
    (copy / "manifest.json").unlink()
    load_compressed(copy)
    assert "auto_map" in caplog.text
    assert "manifest.json" in caplog.text


@pytest.mark.parametrize("byte", [0x00, 0xA7, 0xFF])
def test_every_byte_of_packed_codes_is_an_entry(copy, byte):
    """Whatever lies in the buffers of codes, the model computes what the formula of its layers gives."""
    change_tensors(
        lambda tensors: {
            name: torch.full_like(value, byte) if value.dtype is torch.uint8 else value
            for name, value in tensors.items()
        }
    )(copy)
    model, _ = load_compressed(copy)
    seen = set()
    for layer in model.modules():
        if not isinstance(layer, AdditiveLinear | UniformLinear):
            continue
        seen.add(type(layer))
        codes = layer.codes_unpacked()
        if isinstance(layer, AdditiveLinear):
            assert int(codes.max()) < layer.entries
            expected = dequantize_additive_reference(codes, layer.codebooks, layer.scales)[:, : layer.in_features]
        else:
            assert int(codes.max()) < 2**layer.bits
            groups = torch.arange(layer.in_features) // layer.group_size
            expected = (codes.float() - layer.zeros_unpacked().float()[:, groups]) * layer.scales[:, groups]
        torch.testing.assert_close(layer.dequantize(), expected)
        x = torch.ones(1, layer.in_features)
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, expected, layer.bias), atol=1e-4, rtol=1e-4)
    assert seen == {AdditiveLinear, UniformLinear}
