"""Models read block by block against the same files loaded whole by transformers."""

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from casp_pl.checkpoint import save_streamed
from casp_pl.checkpoint.manifest import Manifest
from casp_pl.errors import ConfigError, InputError, IntegrityError
from casp_pl.models import ModelAdapter
from casp_pl.models.load import ModelSource
from casp_pl.models.memory import Memory, free_memory
from casp_pl.models.soundness import require_materialized
from casp_pl.models.stored_blocks import LentBlock, StoredBlocks
from casp_pl.models.streams import first_block_batches, run_blocks
from casp_pl.models.weight_files import tensor_files

CPU = torch.device("cpu")


@pytest.fixture
def folder(stored_tiny: Path, tmp_path: Path) -> Path:
    """The stored tiny model, a copy that a test may break."""
    for path in stored_tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def _open(folder: Path, dtype: str = "float32") -> ModelAdapter:
    return ModelSource(source=str(folder), dtype=dtype).open(CPU, streamed=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_and_logits_are_those_of_the_whole_model(
    stored_tiny: Path, batches: list[dict[str, Any]], dtype: str
) -> None:
    whole = ModelSource(source=str(stored_tiny), dtype=dtype).open(CPU)  # type: ignore[arg-type]
    streamed = _open(stored_tiny, dtype)
    assert streamed.stored is not None
    assert whole.stored is None
    for block, original in zip(streamed.originals(), whole.originals(), strict=True):
        assert block.state_dict().keys() == original.state_dict().keys()
        assert all(torch.equal(tensor, block.state_dict()[name]) for name, tensor in original.state_dict().items())
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in batch}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(whole.model.dtype)
        with torch.no_grad():
            assert torch.equal(streamed.model(**inputs).logits, whole.model(**inputs).logits)
    assert streamed.shapes(1) == whole.shapes(1)
    assert streamed.model.config.to_dict() == whole.model.config.to_dict()


def test_nothing_of_a_block_stays(stored_tiny: Path, batches: list[dict[str, Any]]) -> None:
    adapter = _open(stored_tiny)
    outside = sum(parameter.numel() for parameter in adapter.model.parameters())
    states = first_block_batches(adapter, batches)
    for block in adapter.originals():
        states = run_blocks(block, states)
    assert all(isinstance(block, LentBlock) for block in adapter.blocks)
    assert sum(parameter.numel() for parameter in adapter.model.parameters()) == outside
    assert not any(".layers." in name and "language" in name for name, _ in adapter.model.named_parameters())


def test_what_lies_outside_the_blocks_is_put_away_and_read_again(
    stored_tiny: Path, batches: list[dict[str, Any]]
) -> None:
    adapter = _open(stored_tiny)
    before = {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}
    parameters = list(adapter.outside_parameters())
    states = first_block_batches(adapter, batches)
    with adapter.blocks_alone():
        assert sum(parameter.numel() for parameter in adapter.model.parameters()) == 0
        expected = [block(states[0].hidden, **states[0].arguments) for block in adapter.originals()]
    assert all(one is other for one, other in zip(parameters, adapter.outside_parameters(), strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.model.state_dict().items())
    again = [block(states[0].hidden, **states[0].arguments) for block in adapter.originals()]
    assert all(torch.equal(one, other) for one, other in zip(expected, again, strict=True))


def test_originals_look_at_the_attention_that_the_decoder_is_set_to(stored_tiny: Path) -> None:
    adapter = _open(stored_tiny)
    adapter.decoder.set_attn_implementation("eager")
    block = next(adapter.originals([1]))
    assert block.self_attn.config is adapter.decoder.config


def test_experts_that_transformers_puts_together(tmp_path: Path) -> None:
    """Files hold a matrix for each expert, memory one tensor for all: the conversion is transformers' own."""
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path, max_shard_size="20KB")
    files = tensor_files(tmp_path)
    assert any(".experts.2." in name for name in files), "stored one by one"
    whole: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    skeletons: nn.ModuleList = whole.model.layers
    with torch.device("meta"):
        skeletons = type(whole.model)(config).layers
    stored = StoredBlocks(whole, skeletons, "model.layers.", files, CPU)
    for number in range(2):
        expected = whole.model.layers[number].state_dict()
        actual = stored.read(number).state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_an_index_that_points_outside_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(name for name in index["weight_map"] if "layers.1" in name)
    index["weight_map"][name] = f"../{index['weight_map'][name]}"
    path.write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match="outside the directory"):
        _open(folder)


def test_a_tensor_that_is_not_stored_is_named(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(name for name in index["weight_map"] if name.endswith("layers.1.mlp.up_proj.weight"))
    del index["weight_map"][name]
    path.write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        _open(folder)


def test_a_broken_shard_is_named(folder: Path) -> None:
    adapter = _open(folder)
    shard = tensor_files(folder)[next(name for name in tensor_files(folder) if "layers.0" in name)]
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(IntegrityError, match=shard.name):
        list(adapter.originals())


def test_a_meta_tensor_is_named() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    module[0].register_buffer("angles", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(InputError, match=r"block\.1\.weight was never filled.*3 tensors"):
        require_materialized(module, "block.")


def test_a_model_without_files_cannot_be_streamed() -> None:
    with pytest.raises(ConfigError, match="streaming"):
        ModelSource(source="tiny", streaming=True).streams(0, Memory(1 << 40, 1 << 40))


@pytest.mark.parametrize(
    ("free", "streamed"),
    [
        (Memory(600_000, 600_000), False),
        (Memory(540_000, 600_000), True),  # more than 2.2 times the model: its evaluation needs a dense copy
        (Memory(600_000, 240_000), True),  # it passes through the host's memory
    ],
)
def test_a_model_is_streamed_where_it_does_not_fit(free: Memory, streamed: bool) -> None:
    assert ModelSource(source="a/model").streams(250_000, free) == streamed
    for wish in (False, True):
        assert ModelSource(source="a/model", streaming=wish).streams(250_000, free) == wish


def test_the_memory_of_a_machine_is_divided_among_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    assert free_memory(CPU, 3) == Memory(333, 333)
    others = [(400, 400), (500, 250)]
    monkeypatch.setattr("casp_pl.models.memory.of_all", lambda mine: [mine, *others])
    assert free_memory(CPU, 3) == Memory(333, 250), "what all can have"


def test_a_quantized_model_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match="quantized already"):
        ModelSource(source=str(folder)).open(CPU, streamed=True)


def _bytes_read() -> int:
    """By all threads of this process so far."""
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    assert found is not None
    return int(found[1])


def test_the_next_block_is_read_while_one_is_in_use(stored_tiny: Path) -> None:
    stored = _open(stored_tiny).stored
    assert stored is not None
    before = _bytes_read()
    size = sum(tensor.nbytes for tensor in stored.read(0).state_dict().values())
    stored._reader.shutdown(wait=True)
    assert _bytes_read() - before >= 2 * size, "both blocks have the same shapes"


@pytest.mark.parametrize("moment", ["fsync", "rename"])
def test_a_killed_save_leaves_no_directory(
    stored_tiny: Path, tmp_path: Path, killed_in: Callable[..., None], moment: str
) -> None:
    adapter, out = _open(stored_tiny), tmp_path / "model"
    save = partial(save_streamed, adapter, list(adapter.originals()), None, out, card="")
    killed_in(os, moment, save)
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".tmp")
    save()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert Manifest.load(out).problems(out) == {}
