"""QuIP#'s codes stay in training and its vectors su and sv move: both stages, judged by dense models of their files."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from casp_pl.checkpoint import RunDirectory
from casp_pl.cli import recipe_parsers, settings_from
from casp_pl.console import RunProgress
from casp_pl.layers import LatticeLinear
from casp_pl.layers.lattice_weight import dequantize_lattice_reference, lattice_quarters
from casp_pl.models import ModelAdapter
from casp_pl.models.activations import in_memory
from casp_pl.models.compress import round_to_nearest
from casp_pl.models.surgery import compressed_layers
from casp_pl.pipeline import block_files
from casp_pl.pipeline.block_files import BlockFiles, block_name, save_block
from casp_pl.pipeline.blocks import tune_blocks
from casp_pl.pipeline.broken_samples import BrokenSamples
from casp_pl.pipeline.end_to_end import FOLDER, EndToEndStage
from casp_pl.pipeline.prepare import RunBatches, load_batches, prepare
from casp_pl.pipeline.settings import RunSettings
from casp_pl.pipeline.trainers import TrainerFactory
from casp_pl.quantizers import QuIPSharpQuantizer

pytestmark = pytest.mark.filterwarnings(  # the command line silences these as well (console/logs.py)
    r"ignore:Found \d+ module\(s\) in eval mode", "ignore:.*does not have many workers"
)
ROOT = Path(__file__).parents[2]
QUIP = ["--config", str(ROOT / "configs/llava_quip.yaml"), "--config", str(ROOT / "configs/models/tiny.yaml")]
STEPS = 16
States = dict[str, dict[str, Tensor]]


class Job(NamedTuple):
    """The tiny model, texts, and what trains on them."""

    settings: RunSettings
    adapter: ModelAdapter
    batches: RunBatches
    trainers: TrainerFactory


@pytest.fixture(scope="module")
def job() -> Job:
    options = ["--data.text_ratio", "1", "--end_to_end.steps", str(STEPS), "--end_to_end.lr", "3e-3"]
    parser = recipe_parsers()["fit"]
    settings = settings_from(parser, parser.parse_args([*QUIP, *options]))
    prepared = prepare(settings)
    trainers = TrainerFactory({"accelerator": "cpu", "precision": "32-true"}, None)
    return Job(settings, prepared.adapter, load_batches(settings, prepared.device), trainers)


@pytest.fixture(params=[2, 3])
def run(request: pytest.FixtureRequest, job: Job, tmp_path: Path) -> Any:
    """A run whose blocks are of lattice layers, with E8P alone or with a codebook on its residual."""
    with RunDirectory.open(tmp_path / "run", {}) as opened:
        for number, block in enumerate(round_to_nearest(job.adapter, QuIPSharpQuantizer(), request.param)):
            save_block(opened, block_name("blocks", number), block)
        yield opened


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> States:
    """What training hands over to be filed, by file."""
    states: States = {}

    def recorded(run: RunDirectory, name: str, block: nn.Module, **notes: Any) -> None:
        states[name] = copy.deepcopy(dict(block.state_dict()))
        block_files.save_block(run, name, block, **notes)

    for stage in ("blocks", "end_to_end"):
        monkeypatch.setattr(f"casp_pl.pipeline.{stage}.save_block", recorded)
    return states


def dense(block: nn.Module) -> nn.Module:
    """The block with the weights that the formula gives."""
    for name, layer in compressed_layers(block).items():
        assert isinstance(layer, LatticeLinear)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        quarters = lattice_quarters(layer.codes, layer.bits)
        linear.weight.data = dequantize_lattice_reference(quarters, layer.su, layer.sv, layer.bits).detach()
        if layer.bias is not None:
            linear.bias.data = layer.bias.detach()
        block.set_submodule(name, linear)
    return block


@torch.no_grad()
def held_back(job: Job, blocks: Sequence[nn.Module] | None) -> list[tuple[Tensor, Tensor]]:
    """Output of the last block and logits of every held-back text, (T, I) and (T, V); None: of the original."""
    found: list[Tensor] = []
    results = []
    with job.adapter.with_blocks(list(job.adapter.blocks) if blocks is None else [dense(b) for b in blocks]) as model:
        handle = job.adapter.blocks[-1].register_forward_hook(lambda _, __, output: found.append(output))
        for batch in job.batches.held_back:
            for ids, real in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
                logits = model(input_ids=ids[real][None]).logits[0]
                results.append((found[-1][0], logits))
        handle.remove()
    return results


def errors_and_divergence(job: Job, blocks: Sequence[nn.Module]) -> tuple[float, float]:
    """Mean relative error behind the last block, and mean KL of what predicts a token; by their formulas."""
    errors, divergences = [], []
    for (target, theirs), (output, mine) in zip(held_back(job, None), held_back(job, blocks), strict=True):
        errors.append((output - target).square().sum(-1) / target.square().sum(-1))
        p, q = theirs[:-1].log_softmax(-1), mine[:-1].log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(errors).mean()), float(torch.cat(divergences).mean())


def check_files(run: RunDirectory, folder: str, job: Job, saved: States) -> None:
    """Vectors moved, codes did not; files and what is read from them are what was handed over, to the bit."""
    for number, block in enumerate(BlockFiles(run, folder, job.adapter).as_trained()):
        name = block_name(folder, number)
        read, filed, given = block.state_dict(), load_file(run.path(name)), saved[name]
        assert read.keys() == filed.keys() == given.keys()
        assert all(torch.equal(read[key], given[key]) and torch.equal(filed[key], given[key]) for key in given)
        before = load_file(run.path(block_name("blocks", number)))
        kinds = {"su": 0, "sv": 0, "codes": 0}
        for key in given:
            kind = key.rsplit(".", 1)[-1]
            if kind in kinds:
                kinds[kind] += 1
                assert torch.equal(given[key], before[key]) == (kind == "codes"), key
        assert set(kinds.values()) == {len(job.adapter.linear_names)}


def test_block_tuning_moves_the_vectors_alone(run: RunDirectory, job: Job, saved: States) -> None:
    told: list[dict[str, float]] = []
    tune_blocks(
        run,
        job.adapter,
        BlockFiles(run, "blocks", job.adapter),
        job.trainers,
        job.batches.tuning,
        job.batches.held_back,
        window=len(job.adapter.blocks),
        tuning={"epochs": 4, "lr": 1e-2},
        update=job.settings.codebook_update,
        seed=0,
        window_done=lambda _, losses, __: told.append(losses),
    )
    check_files(run, "tuned", job, saved)
    (losses,) = told
    before, _ = errors_and_divergence(job, BlockFiles(run, "blocks", job.adapter).as_trained())
    after, _ = errors_and_divergence(job, BlockFiles(run, "tuned", job.adapter).as_trained())
    assert losses == pytest.approx({"held_back_before": before, "held_back_after": after}, rel=1e-3)
    assert after < 0.99 * before


def test_end_to_end_training_moves_the_vectors_alone(run: RunDirectory, job: Job, saved: States) -> None:
    with RunProgress({"end to end": 1.0}, enabled=False) as progress:
        broken = BrokenSamples(run, job.adapter, job.settings.data, None)
        stage = EndToEndStage(job.settings, run, job.adapter, job.trainers, progress, broken, in_memory)
        stage.fit(BlockFiles(run, "blocks", job.adapter), job.batches.held_back)
    check_files(run, FOLDER, job, saved)
    best: Any = stage.callbacks[0]
    _, before = errors_and_divergence(job, BlockFiles(run, "blocks", job.adapter).as_trained())
    _, after = errors_and_divergence(job, BlockFiles(run, FOLDER, job.adapter))
    assert best.first == pytest.approx(before, rel=1e-3)
    assert best.best == pytest.approx(after, rel=1e-2), "but for the float16 that vectors are stored in"
    assert after < 0.99 * before
