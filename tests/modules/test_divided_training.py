"""A divided model trains as a whole one does, with blocks that are computed twice and with products in bfloat16."""

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch

STEPS = 3

DRIVER = """
import copy, os, sys
from pathlib import Path
import lightning.pytorch as pl
import torch, torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader
from casp_pl.data.collate import Collator
from casp_pl.data.sample import Sample, Turn
from casp_pl.data.selection import encode_conversations
from casp_pl.models import adapt, load_model
from casp_pl.models.compress import round_to_nearest
from casp_pl.modules import EndToEndModule, checkpointing
from casp_pl.modules.end_to_end import teacher_states
from casp_pl.modules.parameters import trainable_parameters
from casp_pl.modules.sharding import Sharding, trained_parts, whole_tensors
from casp_pl.pipeline.launch import leave
from casp_pl.pipeline.strategies import sharded_strategy
from casp_pl.processes import mean_of_all
from casp_pl.quantizers import RTNQuantizer

rank, count, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(sys.argv[1])
Image.new("RGB", (24, 20), "red").save(folder / f"{count}-{rank}.png")
recomputed = []
checkpoint = checkpointing.checkpoint
checkpointing.checkpoint = lambda *inputs, **how: recomputed.append(0) or checkpoint(*inputs, **how)

def sample(number):
    "Every second one has an image, so that of two processes one does not see any."
    images = (folder / f"{count}-{rank}.png",) if number % 2 else ()
    return Sample(f"sample {number}", (Turn("What is odd?", f"It is number {number}."),), None, images, 0)

def encoded(processor, numbers):
    return [one for number in numbers for one in encode_conversations([sample(number)], processor, 4096)[0]]

class Losses(pl.Callback):
    "Of whole batches."
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(float(mean_of_all(outputs["loss"].detach())))

def fit(wrapping, recompute, autocast):
    model, processor = load_model("tiny")
    adapter = adapt(model.requires_grad_(False))
    blocks = list(round_to_nearest(adapter, RTNQuantizer(group_size=8), 4))
    for block in blocks:
        trainable_parameters(block)
    before = [{name: value.clone() for name, value in trained_parts(block).items()} for block in blocks]
    batches = [encoded(processor, range(4 * step, 4 * step + 4)) for step in range(STEPS)]
    collate = Collator(processor)
    teacher = teacher_states(adapter, [collate(batch) for batch in batches])
    own = [collate(batch[rank::count]) for batch in batches]
    whole = wrapping is None
    sharding = None if whole else Sharding(wrapping, lambda number: copy.deepcopy(blocks[number]), autocast)
    losses, several = Losses(), {} if whole else {"strategy": sharded_strategy(wrapping)}
    trainer = pl.Trainer(
        accelerator="cpu", devices=count, max_steps=STEPS, logger=False, enable_checkpointing=False, callbacks=[losses],
        precision="bf16-mixed" if whole and autocast else "32-true", enable_progress_bar=False, gradient_clip_val=1.0,
        enable_model_summary=False, use_distributed_sampler=False, inference_mode=False, **several,
    )
    recomputed.clear()
    with adapter.with_blocks(blocks if whole else list(adapter.blocks)):
        module = EndToEndModule(
            adapter, teacher, lr=0.01, steps=STEPS, activation_checkpointing=recompute, sharding=sharding
        )
        trainer.fit(module, train_dataloaders=DataLoader(own, batch_size=None))
    after = []
    for block, old in zip(module.blocks, before, strict=True):
        shapes = {name: value.shape for name, value in old.items()}
        after.append(whole_tensors(trained_parts(block), shapes))
    flat = lambda parts: {f"{number}.{name}": v for number, part in enumerate(parts) for name, v in part.items()}
    return {"losses": losses.values, "before": flat(before), "after": flat(after), "recomputed": len(recomputed)}

if count > 1:
    dist.init_process_group("gloo")
results = {}
for wrapping in (None,) if count == 1 else ("fsdp", "fsdp2"):
    for recompute in (False, True):
        for autocast in (None, torch.bfloat16):
            results[wrapping, recompute, autocast is not None] = fit(wrapping, recompute, autocast)
torch.save(results, folder / f"{count}-{rank}.pt")
leave(0)
"""

Results = dict[tuple[str | None, bool, bool], dict[str, Any]]


@pytest.fixture(scope="module")
def results(
    start_together: Callable[..., list[subprocess.Popen[bytes]]],
    finish_together: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Results:
    """(wrapping or None for one process, blocks computed twice, bfloat16) -> what a training gave."""
    folder = tmp_path_factory.mktemp("divided")
    script = ["-c", f"STEPS = {STEPS}\n{DRIVER}", str(folder)]
    finish_together([*start_together(script, 1), *start_together(script, 2)])
    read = [torch.load(folder / name, weights_only=True) for name in ("1-0.pt", "2-0.pt")]
    return {key: value for part in read for key, value in part.items()}


def assert_trained(result: dict[str, Any]) -> None:
    moved = [name for name, tensor in result["after"].items() if not torch.equal(tensor, result["before"][name])]
    assert len(moved) > 0.9 * len(result["after"]) > 0
    assert max(result["losses"]) > 1.001 * min(result["losses"])


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_in_float32_losses_and_parameters_are_those_of_one_process(
    wrapping: str, recompute: bool, results: Results
) -> None:
    one, divided = results[None, False, False], results[wrapping, recompute, False]
    assert_trained(divided)
    assert (divided["recomputed"] > 0) == recompute
    assert divided["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert divided["after"].keys() == one["after"].keys()
    for name, tensor in one["after"].items():
        torch.testing.assert_close(divided["after"][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_in_bfloat16_losses_are_those_of_one_process_but_for_rounding(
    wrapping: str, recompute: bool, results: Results
) -> None:
    one, exact = results[None, recompute, True], results[None, recompute, False]
    divided = results[wrapping, recompute, True]
    assert_trained(divided)
    assert (divided["recomputed"] > 0) == recompute
    assert divided["losses"] != pytest.approx(exact["losses"], rel=1e-5), "products are rounded"
    assert divided["losses"] == pytest.approx(one["losses"], rel=0.02)
    assert all(tensor.dtype == one["after"][name].dtype for name, tensor in divided["after"].items())
