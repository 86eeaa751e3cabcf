"""Figures of one stage: what the model answers, how far it is from the original, what it costs."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from casp_pl.callbacks import Advance, StageReport
from casp_pl.callbacks.report import StageRow
from casp_pl.callbacks.stage_table import stage_title
from casp_pl.checkpoint import RunDirectory
from casp_pl.checkpoint.stored_names import compact_state_dict
from casp_pl.data.evaluation import EvaluationData
from casp_pl.data.tokenize import Processor
from casp_pl.evaluation import ReferenceOutputs
from casp_pl.evaluation.scoring import AnswerRule
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.surgery import compressed_layers
from casp_pl.modules.evaluation import EvaluationModule
from casp_pl.pipeline.block_files import runnable
from casp_pl.pipeline.trainers import TrainerFactory

__all__ = ["Measurement", "bits_per_weight", "evaluation_module", "finite_row", "stage_costs"]

_LOG = logging.getLogger(__name__)


class Measurement:
    """Evaluates stages on the same data and keeps the outputs of each, the original's as the reference of the others.

    Args:
        run: the outputs are kept there as outputs/STAGE.safetensors.
        data: questions and text.
        processor: the model's processor.
        rule: scores the answers.
        trainers: makes the Trainer of each test run.
    """

    def __init__(
        self,
        run: RunDirectory,
        data: EvaluationData,
        processor: Processor,
        rule: AnswerRule,
        trainers: TrainerFactory,
    ) -> None:
        self.run = run
        self.data = data
        self.rule = rule
        self.processor = processor
        self.trainers = trainers

    def knows(self, stage: str) -> bool:
        """Whether the outputs of a stage are kept, if there are any."""
        return self.steps == 0 or self.run.has(_file(stage))

    def outputs(self, stage: str) -> ReferenceOutputs:
        """What the model of a stage answered."""
        return ReferenceOutputs.from_tensors(*self.run.read_tensors(_file(stage)))

    @property
    def steps(self) -> int:
        """Batches of one evaluation."""
        return sum(len(loader) for loader in self.data.test_dataloader())

    def measure(
        self,
        stage: str,
        adapter: ModelAdapter,
        blocks: Sequence[nn.Module],
        advance: Callable[[], None],
        *,
        started: float,
    ) -> StageRow:
        """Evaluate the model with these blocks in place; `advance` is called after every batch.

        Without questions and text (`evaluation.questions` and `text_tokens` 0) the row says what the stage costs.

        Args:
            stage: its name.
            adapter: the original model.
            blocks: what stands in place of its blocks.
            advance: takes no argument.
            started: when the stage began (`time.monotonic`): its seconds include the work before the evaluation.
        """
        costs = stage_costs(stage, adapter, blocks)
        if self.steps == 0:
            return replace(costs, seconds=time.monotonic() - started)
        reference = None if stage == "original" else self.outputs("original")
        with adapter.with_blocks(runnable(blocks, adapter)) as model:
            module = evaluation_module(model, self.processor, self.data, self.rule, reference)
            report = StageReport(costs, started=started, logger=self.trainers.logger)
            trainer = self.trainers.make(callbacks=[Advance(advance, loop="test"), report], logger=False)
            trainer.test(module, datamodule=self.data, verbose=False)
        if module.outputs is None:
            raise RuntimeError("the test run ended without outputs")
        self.run.write_tensors(_file(stage), *module.outputs.to_tensors())
        return report.row


def evaluation_module(
    model: nn.Module, processor: Processor, data: EvaluationData, rule: AnswerRule, reference: ReferenceOutputs | None
) -> EvaluationModule:
    """Measures `model` on `data` as the recipe says."""
    return EvaluationModule(model, processor, rule=rule, reference=reference, max_new_tokens=data.max_new_tokens)


def finite_row(row: StageRow) -> StageRow:
    """The row without the figures of a model so broken that they are not finite, with a warning that names them.

    JSON has no such numbers, and a run goes on: the next stage may be sound.
    """
    figures: dict[str, Any] = asdict(row)
    broken = [name for name, value in figures.items() if not _is_finite(value)]
    if broken:
        said = ", ".join(f"{name} {figures[name]}" for name in broken)
        _LOG.warning("%s: not finite, so they read n/a and are kept as null: %s", stage_title(row.name), said)
    return StageRow(**(figures | dict.fromkeys(broken)))


def _is_finite(figure: Any) -> bool:
    parts = figure if isinstance(figure, tuple) else (figure,)
    return all(math.isfinite(part) for part in parts if isinstance(part, float))


def stage_costs(stage: str, adapter: ModelAdapter, blocks: Sequence[nn.Module]) -> StageRow:
    """The row of a stage: what it costs."""
    codes, total = bits_per_weight(adapter, blocks)
    with adapter.with_blocks([]) as model:
        stored = _stored_bytes(model)
    stored += sum(map(_stored_bytes, adapter.originals() if stage == "original" else blocks))
    return StageRow(name=stage, bits_per_weight_codes=codes, bits_per_weight_total=total, model_bytes=stored)


def _stored_bytes(module: nn.Module) -> int:
    """Bytes in a file; tensors are told apart by identity, so that a tied one counts once."""
    return sum({id(tensor): tensor.nbytes for tensor in compact_state_dict(module).values()}.values())


def bits_per_weight(adapter: ModelAdapter, blocks: Sequence[nn.Module]) -> tuple[float, float]:
    """Bits per original weight of the compressed linears, codes alone and everything counted; 16 for the original.

    A linear that was left dense counts the 16 bits that it is stored in.
    """
    codes = total = weights = 0
    for number, block in enumerate(blocks):
        layers = compressed_layers(block)
        for name, (out_features, in_features) in adapter.shapes(number).items():
            layer = layers.get(name)
            count = out_features * in_features
            weights += count
            codes += 16 * count if layer is None else layer.code_bits
            total += 16 * count if layer is None else layer.storage_bits
    return codes / weights, total / weights


def _file(stage: str) -> str:
    return f"outputs/{stage}.safetensors"
