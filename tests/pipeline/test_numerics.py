"""NaN and want of memory in the stages themselves: what is skipped, tried again, and given up with its name."""

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from casp_pl.callbacks import BestState
from casp_pl.callbacks.report import StageRow
from casp_pl.checkpoint import RunDirectory
from casp_pl.cli import recipe_parsers, settings_from
from casp_pl.console import RunProgress
from casp_pl.errors import NumericsError, ResourceError
from casp_pl.models import ModelAdapter, adapt, load_model
from casp_pl.models.activations import in_memory
from casp_pl.models.compress import round_to_nearest
from casp_pl.models.streams import BlockBatch, first_block_batches, run_blocks
from casp_pl.modules import BlockwiseModule, EndToEndModule
from casp_pl.modules.end_to_end import teacher_states
from casp_pl.pipeline.block_files import BlockFiles, block_name, save_block
from casp_pl.pipeline.blocks import _tune_window
from casp_pl.pipeline.broken_samples import BrokenSamples
from casp_pl.pipeline.end_to_end import EndToEndStage
from casp_pl.pipeline.measure import Measurement, finite_row
from casp_pl.pipeline.prepare import RunBatches, load_batches, prepare
from casp_pl.pipeline.run import CompressionRun
from casp_pl.pipeline.settings import RunSettings
from casp_pl.pipeline.trainers import TrainerFactory, as_loader
from casp_pl.quantizers import RTNQuantizer

pytestmark = pytest.mark.filterwarnings(  # the command line silences these as well (console/logs.py)
    r"ignore:Found \d+ module\(s\) in eval mode", "ignore:.*does not have many workers"
)
NAN = float("nan")
Pairs = list[tuple[BlockBatch, Tensor]]


@pytest.fixture(scope="module")
def adapter() -> ModelAdapter:
    return adapt(load_model("tiny")[0])


@pytest.fixture(scope="module")
def quantized(adapter: ModelAdapter) -> list[nn.Module]:
    return list(round_to_nearest(adapter, RTNQuantizer(group_size=16), 3))


@pytest.fixture
def trainers() -> TrainerFactory:
    return TrainerFactory({"accelerator": "cpu", "precision": "32-true"}, None)


def texts(count: int, name: str) -> list[dict[str, Any]]:
    """Batches of four texts of 17 tokens."""
    generator = torch.Generator().manual_seed(count)
    result = []
    for number in range(count):
        ids = torch.randint(0, 200, (4, 17), generator=generator)
        names = [f"{name}/{number}/{row}" for row in range(4)]
        result.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "sample_ids": names})
    return result


@pytest.fixture
def window(adapter: ModelAdapter) -> Callable[[], tuple[Pairs, list[tuple[BlockBatch, list[Tensor]]]]]:
    """Makes (training pairs, held-back pairs) of the first block."""

    def make() -> tuple[Pairs, list[tuple[BlockBatch, list[Tensor]]]]:
        inputs = first_block_batches(adapter, texts(5, "train"))
        targets = run_blocks(adapter.blocks[0], inputs)
        pairs = [(batch, target.hidden) for batch, target in zip(inputs, targets, strict=True)]
        return pairs[:4], [(batch, [target]) for batch, target in pairs[4:]]

    return make


def break_sample(pairs: Pairs, number: int) -> None:
    batch, target = pairs[number]
    hidden = batch.hidden.clone()
    hidden[1, 5] = NAN
    pairs[number] = (replace(batch, hidden=hidden), target)


def tune(
    blocks: list[nn.Module], pairs: Pairs, held: list[Any], trainers: TrainerFactory
) -> tuple[list[nn.Module], dict[str, float]]:
    make = partial(BlockwiseModule, train=pairs, held_back=held, epochs=1, lr=2e-4)
    return _tune_window(make, blocks, trainers, {"fraction": 0.0})


def test_one_broken_batch_costs_block_tuning_a_restart(
    window: Any, quantized: list[nn.Module], trainers: TrainerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    pairs, held = window()
    break_sample(pairs, 0)
    with caplog.at_level(logging.WARNING):
        (block,), losses = tune(quantized[:1], pairs, held, trainers)
    assert "block tuning (blocks 0 to 0): the loss is NaN" in caplog.text
    assert losses["held_back_after"] < losses["held_back_before"]
    assert all(tensor.isfinite().all() for tensor in block.state_dict().values())


def test_two_broken_batches_end_block_tuning(window: Any, quantized: list[nn.Module], trainers: TrainerFactory) -> None:
    pairs, held = window()
    break_sample(pairs, 1)
    break_sample(pairs, 2)
    with pytest.raises(NumericsError, match=r"block tuning \(blocks 0 to 0\), step \d: .* again") as caught:
        tune(quantized[:1], pairs, held, trainers)
    assert "block_tuning.lr" in str(caught.value)


@pytest.mark.parametrize("broken", [1, 2])
def test_end_to_end_tuning_goes_on_once(
    broken: int, adapter: ModelAdapter, quantized: list[nn.Module], trainers: TrainerFactory
) -> None:
    batches, held_back = texts(4, "train"), texts(1, "held back")
    teacher = teacher_states(adapter, [*batches, *held_back])
    for number in range(1, 1 + broken):
        teacher[f"train/{number}/0"][3] = NAN
    best = BestState()
    trainer = trainers.make(
        callbacks=[best],
        max_steps=4,
        max_epochs=-1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
    )
    with adapter.with_blocks(copy.deepcopy(quantized)):
        module = EndToEndModule(adapter, teacher, steps=4, lr=1e-2)
        trainer.validate(module, dataloaders=as_loader(held_back), verbose=False)
        loaders = {"train_dataloaders": as_loader(batches), "val_dataloaders": as_loader(held_back)}
        if broken == 2:
            with pytest.raises(NumericsError, match=r"end-to-end fine-tuning, step 2: .* again(.|\n)*end_to_end\.lr"):
                trainer.fit(module, **loaders)
            return
        trainer.fit(module, **loaders)
    assert best.restarts == 1
    assert best.best < best.first


@pytest.mark.parametrize("room", [1, 2])
def test_block_tuning_takes_fewer_samples_at_a_time_where_memory_is_short(
    room: int, window: Any, quantized: list[nn.Module], trainers: TrainerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    pairs, held = window()
    (plenty,), expected = tune(quantized[:1], pairs, held, trainers)
    short = copy.deepcopy(quantized[0])
    handle = _no_room_for_more_than(short, room)
    with caplog.at_level(logging.WARNING):
        (block,), losses = tune([short], pairs, held, trainers)
    handle.remove()
    assert f"1/{4 // room} of a batch" in caplog.text
    assert losses == pytest.approx(expected, rel=1e-3)
    moved, alike = (
        torch.cat([(other.state_dict()[name] - start).float().flatten() for name, start in short.state_dict().items()])
        for other in (plenty, block)
    )
    assert torch.cosine_similarity(moved, alike, dim=0) > 0.99


def test_block_tuning_gives_up_with_a_single_sample(
    window: Any, quantized: list[nn.Module], trainers: TrainerFactory
) -> None:
    pairs, held = window()
    short = copy.deepcopy(quantized[0])
    _no_room_for_more_than(short, 0)
    with pytest.raises(ResourceError, match=r"Out of memory in block tuning .*, 1 samples at a time"):
        tune([short], pairs, held, trainers)


def _no_room_for_more_than(block: nn.Module, samples: int) -> Any:
    """A device whose memory holds what so many samples keep for the backward pass."""

    def refuse(_: nn.Module, positional: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() and len(positional[0]) > samples:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return block.mlp.get_submodule("down_proj").register_forward_pre_hook(refuse)


def run_that_breaks(recipe: list[str], folder: Path, samples: int) -> tuple[RunSettings, ModelAdapter, RunBatches]:
    """A recipe on `samples` windows of a text, and a model whose embedding of one character in it is NaN."""
    text = "the quick brown fox jumps over the lazy dog " * samples
    (folder / "text.txt").write_text(text[:1000] + "#" + text[1001 : 32 * samples + 10])
    options = {"text_source": "TextFiles", "text_source.path": str(folder / "text.txt"), "text_length": "32"}
    options |= {"samples": str(samples), "fine_tuning_samples": "null", "text_ratio": "1"}
    words = [word for key, value in options.items() for word in (f"--data.{key}", value)]
    parser = recipe_parsers()["fit"]
    settings = settings_from(parser, parser.parse_args([*recipe[:4], *words, "--trainer.accelerator", "cpu"]))
    prepared = prepare(settings)
    (token,) = prepared.processor.tokenizer("#")["input_ids"]

    def overflow(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.masked_fill((inputs[0] == token)[..., None], NAN)

    prepared.adapter.model.get_input_embeddings().register_forward_hook(overflow)
    return settings, prepared.adapter, load_batches(settings, prepared.device)


def test_a_broken_stage_is_measured_once_and_reads_na(
    recipe: list[str],
    tmp_path: Path,
    trainers: TrainerFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = recipe_parsers()["fit"]
    settings = settings_from(parser, parser.parse_args([*recipe, "--trainer.accelerator", "cpu"]))
    prepared = prepare(settings)
    adapter, measurements = prepared.adapter, []
    broken = copy.deepcopy(list(adapter.blocks))
    broken[1].mlp.get_submodule("down_proj").weight.data[0, 0] = NAN
    measure = Measurement.measure

    def counted(self: Measurement, stage: str, *more: Any, **named: Any) -> StageRow:
        measurements.append(stage)
        return measure(self, stage, *more, **named)

    monkeypatch.setattr(Measurement, "measure", counted)

    def measured_rows(run: RunDirectory) -> list[StageRow]:
        evaluation = Measurement(run, settings.evaluation, prepared.processor, settings.scoring, trainers)
        with RunProgress({"evaluate original": 1.0, "evaluate rtn": 1.0}, enabled=True) as progress:
            compression = CompressionRun(settings, run, adapter, evaluation, trainers, progress)
            for name, blocks in (("original", list(adapter.blocks)), ("rtn", broken)):
                compression._measure(name, blocks)
            return compression.rows()

    with RunDirectory.open(tmp_path / "run", {}) as run:
        first = measured_rows(run)
        stored = run.read_json("stages/rtn.json")
    original, rtn = first
    assert original.perplexity is not None
    for name in ("perplexity", "perplexity_interval", "kl", "kl_interval", "kl_answers"):
        assert (getattr(rtn, name), stored[name]) == (None, None), name
    assert rtn.vqa_interval is not None, "what is finite stays"
    assert rtn.text_tokens == original.text_tokens
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "casp_pl.pipeline.measure"]
    assert warning.startswith("RTN: not finite, so they read n/a and are kept as null: perplexity inf, ")
    shown = capsys.readouterr().out.split("RTN")[1]
    assert "perplexity" in shown
    assert "KL n/a" in shown
    with RunDirectory.open(tmp_path / "run", {}) as run:
        assert measured_rows(run) == first
    assert measurements == ["original", "rtn"], "the resumed run measures nothing again"


def test_an_infinite_figure_goes_with_its_interval() -> None:
    row = StageRow(name="rtn", perplexity=math.inf, perplexity_interval=(7.5, math.inf), kl=3.0, kl_interval=(2.0, 4.0))
    assert finite_row(row) == StageRow(name="rtn", kl=3.0, kl_interval=(2.0, 4.0))


def test_a_held_back_sample_that_breaks_late_is_left_out_of_end_to_end_training(
    recipe: list[str], tmp_path: Path, trainers: TrainerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, adapter, _ = run_that_breaks(recipe, tmp_path, 160)
    (token,) = settings.data._processor.tokenizer("#")["input_ids"]
    for part in (settings.data._kept, settings.data._held_back):
        part[:] = [sample for sample in part if token not in sample.input_ids]
    sound, first = settings.data._held_back[1:], settings.data._held_back[0]
    settings.data._held_back[0] = replace(first, input_ids=(token, *first.input_ids[1:]))
    settings.end_to_end |= {"steps": 2}
    held_back = load_batches(settings, adapter.device).held_back
    passes = []

    def counted(*positional: Any, **named: Any) -> dict[str, Tensor]:
        passes.append(0)
        assert len(passes) < 4, "the same sample is found again and again"
        return teacher_states(*positional, **named)

    monkeypatch.setattr("casp_pl.pipeline.end_to_end.teacher_states", counted)
    losses = []
    validated = EndToEndModule.on_validation_epoch_end

    def recorded(self: EndToEndModule) -> None:
        validated(self)
        losses.append(float(self.trainer.callback_metrics["val_loss"]))

    monkeypatch.setattr(EndToEndModule, "on_validation_epoch_end", recorded)
    with RunDirectory.open(tmp_path / "run", {}) as run, RunProgress({"end to end": 1.0}, enabled=False) as progress:
        for number, block in enumerate(round_to_nearest(adapter, RTNQuantizer(group_size=16), 3)):
            save_block(run, block_name("blocks", number), block)
        broken = BrokenSamples(run, adapter, settings.data, None)
        stage = EndToEndStage(settings, run, adapter, trainers, progress, broken, in_memory)
        stage.fit(BlockFiles(run, "blocks", adapter), held_back)
        assert run.read_json("broken_samples.json") == [first.id]
    assert len(passes) == 2
    assert settings.data._held_back == sound
    assert losses
    assert all(map(math.isfinite, losses))


def names(batches: RunBatches) -> set[str]:
    return {name for batch in [*batches.calibration, *batches.held_back] for name in batch["sample_ids"]}


def test_a_sample_that_the_original_cannot_compute_is_left_out(
    recipe: list[str], tmp_path: Path, trainers: TrainerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    settings, adapter, batches = run_that_breaks(recipe, tmp_path, 160)
    with RunDirectory.open(tmp_path / "run", {}) as run, RunProgress({"calibration": 1.0}, enabled=False) as progress:
        measurement = Measurement(run, settings.evaluation, None, settings.scoring, trainers)

        def sound_batches() -> RunBatches:
            compression = CompressionRun(settings, run, adapter, measurement, trainers, progress)
            return compression._plan_on_sound_samples(batches)[1]

        after = sound_batches()
        assert "1 samples are left out" in caplog.text
        (skipped,) = settings.data.counts["skipped"]
        assert names(batches) - names(after) == {skipped["id"]}
        assert skipped["id"] not in {name for batch in batches.held_back for name in batch["sample_ids"]}
        assert len(names(after)) == 159
        statistics = run.read_tensors("calibration.safetensors")[0]
        assert all(tensor.isfinite().all() for name, tensor in statistics.items() if "sparsity" not in name)
        settings.data.attach(settings.data._processor)  # as a later process of the same run begins
        assert settings.data.counts["skipped"] == []
        assert names(sound_batches()) == names(after)


def test_too_many_such_samples_end_the_run(recipe: list[str], tmp_path: Path) -> None:
    settings, adapter, batches = run_that_breaks(recipe, tmp_path, 90)
    message = r"1 of 90 samples give NaN or infinite activations \(more than 1%\)"
    with RunDirectory.open(tmp_path / "run", {}) as run, pytest.raises(NumericsError, match=message):
        BrokenSamples(run, adapter, settings.data, None).search([*batches.calibration, *batches.held_back])
