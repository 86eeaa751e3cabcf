"""A model that is read block by block gives what the same model gives in memory, bit by bit, within less memory."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from casp_pl import load_compressed
from casp_pl.callbacks import BitAllocation, LowRankAllocation
from casp_pl.checkpoint import RunDirectory
from casp_pl.cli import main
from casp_pl.data import CalibrationData
from casp_pl.errors import ResourceError
from casp_pl.models.activations import ActivationStore
from casp_pl.models.compress import BlockQuantization, LinearReport
from casp_pl.models.load import ModelSource
from casp_pl.pipeline.blocks import quantize_blocks
from casp_pl.quantizers import AQLMQuantizer, GPTQQuantizer, Quantizer, QuIPSharpQuantizer, RTNQuantizer

Done = Callable[[LinearReport, bool], None]
QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "rtn": RTNQuantizer,
    "gptq": GPTQQuantizer,
    "quip": QuIPSharpQuantizer,
    "aqlm": lambda: AQLMQuantizer(max_rounds=1, kmeans_iterations=2, feedback_beam=2, sweep_beam=1),
}


def _quantize(
    model: Path,
    folder: Path,
    quantizer: Quantizer,
    *,
    streaming: bool,
    activations: Literal["auto", "memory", "disk"] = "auto",
    linear_done: Done | None = None,
) -> dict[str, Tensor]:
    """Quantize the two blocks of the stored tiny model: every tensor of their files."""
    source = ModelSource(source=str(model))
    adapter, processor = source.open(torch.device("cpu"), streamed=streaming), source.load_processor()
    data = CalibrationData(samples=6, text_ratio=0.5, text_length=24, batch_size=3)
    data.attach(processor)
    low_rank, bits = LowRankAllocation(keep_ratio=0.5), BitAllocation(budget=3.0)
    bits.attach(quantizer, low_rank)
    plan = bits.make_plan(adapter, low_rank.choose(adapter, None), None)
    with RunDirectory.open(folder, {}) as run:
        quantize_blocks(
            run,
            adapter,
            plan,
            BlockQuantization(seed=1),
            quantizer,
            list(data.calibration_dataloader()),
            lambda *_: None,
            torch.bfloat16,
            keep=ActivationStore(activations, folder),
            linear_done=linear_done,
        )
    return {
        f"{path.name}:{name}": tensor
        for path in sorted((folder / "blocks").iterdir())
        for name, tensor in load_file(path).items()
    }


def _assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)] == []


@pytest.mark.parametrize("name", QUANTIZERS)
def test_streamed_blocks_are_those_quantized_in_memory(name: str, stored_tiny: Path, tmp_path: Path) -> None:
    make = QUANTIZERS[name]
    expected = _quantize(stored_tiny, tmp_path / "memory", make(), streaming=False, activations="memory")
    for activations in ("memory", "disk") if name == "gptq" else ("disk",):
        folder = tmp_path / f"streamed-{activations}"
        _assert_same(_quantize(stored_tiny, folder, make(), streaming=True, activations=activations), expected)
        assert not (folder / "linears").exists() or not any((folder / "linears").iterdir())
        assert not list(folder.glob(".tmp*"))


class _DiesAtTheFourteenth(GPTQQuantizer):
    calls = 0

    def quantize(self, *positional: Any, **keywords: Any) -> Any:
        type(self).calls += 1
        if self.calls == 14:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().quantize(*positional, **keywords)


def _quantize_and_die(model: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    _quantize(model, folder, _DiesAtTheFourteenth(), streaming=True)


@pytest.mark.slow
def test_a_run_killed_inside_a_block_loses_one_linear(stored_tiny: Path, tmp_path: Path) -> None:
    """W_q and W_k are two factors each, so a block takes nine calls; the fourteenth makes W_v of block 1."""
    process = multiprocessing.get_context("spawn").Process(
        target=_quantize_and_die, args=(stored_tiny, tmp_path / "killed")
    )
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    kept = sorted(path.name for path in (tmp_path / "killed" / "linears").rglob("*.safetensors"))
    assert kept == ["self_attn.k_proj.safetensors", "self_attn.q_proj.safetensors"]
    quantizer, calls, found = GPTQQuantizer(), [], []
    quantize = quantizer.quantize

    def counted(*positional: Any, **keywords: Any) -> Any:
        calls.append(keywords["bits"])
        return quantize(*positional, **keywords)

    quantizer.quantize = counted  # type: ignore[method-assign]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        told: Done = lambda _, known: found.append(known)  # noqa: E731
        actual = _quantize(stored_tiny, tmp_path / "killed", quantizer, streaming=True, linear_done=told)
        expected = _quantize(stored_tiny, tmp_path / "whole", GPTQQuantizer(), streaming=True)
    finally:
        torch.set_num_threads(threads)
    _assert_same(actual, expected)
    assert len(calls) == 18 - 13, "only what was not finished is made"
    assert found == [True] * 9 + [False] * 5, "block 0, and two linears of block 1"


def test_a_full_disk_under_the_activations_ends_in_words(
    stored_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ResourceError, match="bytes of activations in"):
        _quantize(stored_tiny, tmp_path / "run", RTNQuantizer(), streaming=True, activations="disk")


def _everything(folder: Path) -> dict[str, Tensor]:
    """Tensors of the finished model, of the calibration, and of what was answered at every stage."""
    files = [*sorted((folder / "model").glob("*.safetensors")), folder / "calibration.safetensors"]
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    for path in sorted((folder / "outputs").glob("*.safetensors")):
        tensors |= {f"{path.name}:{name}": tensor for name, tensor in load_file(path).items()}
    return {name: tensor.nan_to_num(nan=-7.0) for name, tensor in tensors.items()}  # sparsity where nothing was seen


@pytest.mark.slow
def test_a_streamed_fit_is_the_fit_in_memory(recipe: list[str], stored_tiny: Path, tmp_path: Path) -> None:
    less = ["--data.samples", "12", "--data.fine_tuning_samples", "12", "--end_to_end.steps", "2"]
    common = ["fit", *recipe, "--model.source", str(stored_tiny), *less, "--bits.score", "sensitivity"]
    streamed, memory = tmp_path / "streamed", tmp_path / "memory"
    how = ["--model.streaming", "true", "--activations", "disk"]
    assert main([*common, "--run_dir", str(streamed), *how]) == 0
    assert main([*common, "--run_dir", str(memory), "--model.streaming", "false"]) == 0
    _assert_same(_everything(streamed), _everything(memory))
    configs = [json.loads((folder / "model" / "config.json").read_text()) for folder in (streamed, memory)]
    assert configs[0] == configs[1]
    assert len(list((streamed / "model").glob("*.safetensors"))) == 3, "one for each block, one for the rest"
    reports = [json.loads((folder / "report.json").read_text()) for folder in (streamed, memory)]
    figures = [[{**stage, "seconds": 0} for stage in report["stages"]] for report in reports]
    assert figures[0] == figures[1]
    models = [load_compressed(folder / "model")[0] for folder in (streamed, memory)]
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(models[0](input_ids=ids).logits, models[1](input_ids=ids).logits)
    before = {path: path.stat().st_mtime_ns for path in streamed.rglob("*.safetensors")}
    assert main([*common, "--run_dir", str(streamed)]) == 0, "a run may go on in memory"
    assert {path: path.stat().st_mtime_ns for path in streamed.rglob("*.safetensors")} == before


PEAK = """
import resource, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from casp_pl.allocation import ModulePlan
from casp_pl.checkpoint import RunDirectory
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.compress import BlockQuantization
from casp_pl.models.streamed import load_streamed
from casp_pl.pipeline.blocks import quantize_blocks
from casp_pl.allocation import CompressionPlan
from casp_pl.quantizers import RTNQuantizer
from transformers import AutoModelForCausalLM

folder = Path(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
adapter = load_streamed(folder, AutoModelForCausalLM, dtype=torch.float32, device=torch.device("cpu"))
ids = torch.arange(64)[None].repeat(2, 1)
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
modules = [
    ModulePlan(adapter.full_name(number, name), number, shape, "rtn", 2, None, None, 1.0, "")
    for number in range(8) for name, shape in adapter.shapes(number).items()
]
plan = CompressionPlan("llama", tuple(modules), 2.0, "codes", 2.0, 2.0)
before = peak()
with RunDirectory.open(folder / "run", {}) as run:
    quantize_blocks(run, adapter, plan, BlockQuantization(), RTNQuantizer(), [batch], lambda *_: None)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A block has 26 MB of weights, the model 210: quantizing it takes less than three blocks and their moments."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    model.save_pretrained(tmp_path, max_shard_size="30MB")
    del model
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], check=True, capture_output=True, text=True, timeout=900
    )
    moments = 2 * 1024 * 1024 * 8
    assert int(done.stdout.split()[-1]) < 3 * block + 3 * moments < 8 * block
