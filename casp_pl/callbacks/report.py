"""The report of a run: one frozen value that report.json, report.md, the pictures and TensorBoard are made from."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeVar

from casp_pl.errors import IntegrityError

__all__ = [
    "STAGE_NAMES",
    "BlockFigures",
    "CompressionReport",
    "Example",
    "ModuleFigures",
    "StageRow",
    "finite",
    "sparsity_by_modality",
]

STAGE_NAMES = ("original", "rtn", "quantized", "block_tuned", "end_to_end")

_Row = TypeVar("_Row")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """The model at one stage of the run. A figure that was not measured is None.

    Attributes:
        name: `original`, `rtn`, `quantized`, `block_tuned` or `end_to_end`.
        bits_per_weight_codes: code bits per original weight of the compressed linears.
        bits_per_weight_total: the same with codebooks, scales and zeros.
        model_bytes: size of all tensors of the model as stored.
        vqa_accuracy: share of right answers, 0 .. 1.
        vqa_interval: 95 % interval of `vqa_accuracy`.
        vqa_accuracy_not_yes_no: the same on questions whose answer is neither yes nor no.
        perplexity: on held-out text.
        perplexity_interval: 95 % interval of `perplexity`.
        kl: mean KL divergence from the original's next-token distribution on held-out text, in nats.
        kl_interval: 95 % interval of `kl`.
        kl_answers: the same on the answer tokens of the questions.
        kl_answers_interval: 95 % interval of `kl_answers`.
        flip_rate: share of questions answered otherwise than by the original, 0 .. 1.
        flip_interval: 95 % interval of `flip_rate`.
        questions: questions asked.
        text_tokens: tokens behind `perplexity` and `kl`.
        seconds: wall time that the stage took, its evaluation included.
    """

    name: str
    bits_per_weight_codes: float | None = None
    bits_per_weight_total: float | None = None
    model_bytes: int | None = None
    vqa_accuracy: float | None = None
    vqa_interval: tuple[float, float] | None = None
    vqa_accuracy_not_yes_no: float | None = None
    perplexity: float | None = None
    perplexity_interval: tuple[float, float] | None = None
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    kl_answers: float | None = None
    kl_answers_interval: tuple[float, float] | None = None
    flip_rate: float | None = None
    flip_interval: tuple[float, float] | None = None
    questions: int | None = None
    text_tokens: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModuleFigures:
    """One compressed linear.

    Attributes:
        name: full Hugging Face module name.
        block: number of its decoder block.
        shape: (O, I) of the original weight.
        rank: inner width of its low-rank product; None where the weight stayed one matrix.
        bits: bits of its codes (of its factors' codes where it has a rank).
        bits_total: everything stored, in bits per original weight.
        relative_proxy_loss: tr((W - Q) H (W - Q)^T) / tr(W H W^T) right after quantization.
        seconds: wall time of its quantization.
        dead_columns: its inputs that were 0 in every calibration token.
    """

    name: str
    block: int
    shape: tuple[int, int]
    rank: int | None = None
    bits: float | None = None
    bits_total: float | None = None
    relative_proxy_loss: float | None = None
    seconds: float | None = None
    dead_columns: int | None = None

    @property
    def linear(self) -> str:
        """Last part of the name, such as `q_proj`."""
        return self.name.rsplit(".", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class BlockFigures:
    """One decoder block.

    Attributes:
        block: its number.
        score: how much its distortion counted in the bit allocation.
        attention_sparsity: share of its attention probabilities below the threshold, 0 .. 1, by modality, such as
            `text to image` (query to key); None for a pair that did not occur.
    """

    block: int
    score: float | None = None
    attention_sparsity: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question with the answers of both models.

    Attributes:
        question: what was asked.
        original: answer of the original model.
        compressed: answer of the compressed model.
        reference: the right answer, if known.
        image: path of the image, if there is one.
    """

    question: str
    original: str
    compressed: str
    reference: str | None = None
    image: str | None = None


@dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """Everything that a run reports.

    Attributes:
        name: of the run.
        model: what was compressed.
        quantizer: name of the quantizer.
        commit: of the source tree; None outside one.
        versions: of the packages that matter.
        wall_seconds: of the whole run, interrupted parts included.
        work_seconds: the part of it that calibration, quantization and both trainings took, without evaluations; of a
            stage that was interrupted, the sum of its parts.
        peak_memory_bytes: largest resident size of the process, plus the largest device allocation.
        stages: in the order in which they ran.
        modules: every compressed linear.
        blocks: every decoder block.
        data: counts of what really entered calibration.
        examples: a few questions with both answers.
        command: what was typed to make the run.
        machine: what it ran on: system, processor, memory, accelerator; and the code that was chosen for it.
        planned_stages: names of all stages that the recipe has; those without a row have not been measured yet.
    """

    name: str
    model: str
    quantizer: str
    commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    wall_seconds: float | None = None
    work_seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    stages: tuple[StageRow, ...] = ()
    modules: tuple[ModuleFigures, ...] = ()
    blocks: tuple[BlockFigures, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    command: str | None = None
    machine: dict[str, str] = field(default_factory=dict)
    planned_stages: tuple[str, ...] = ()

    @property
    def missing_stages(self) -> list[str]:
        """Names of the stages that have not been measured yet."""
        return [name for name in self.planned_stages if self.stage(name) is None]

    def stage(self, name: str) -> StageRow | None:
        """The row of one stage, None if the run did not have it."""
        return next((row for row in self.stages if row.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """A value for report.json: no key is ever left out, and what is not finite becomes null (with a warning)."""
        return {key: finite(value, key) for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "CompressionReport":
        """The report of a report.json; what an earlier version did not write yet has its default.

        Raises:
            IntegrityError: a key is unknown, or one without a default is missing.
        """
        _check_keys(cls, value, "report")
        rows: dict[str, Any] = {
            "stages": tuple(_row(StageRow, row, "stages") for row in value.get("stages", ())),
            "modules": tuple(_row(ModuleFigures, row, "modules") for row in value.get("modules", ())),
            "blocks": tuple(_row(BlockFigures, row, "blocks") for row in value.get("blocks", ())),
            "examples": tuple(_row(Example, row, "examples") for row in value.get("examples", ())),
            "planned_stages": tuple(value.get("planned_stages", ())),
        }
        return cls(**{**value, **rows})


def sparsity_by_modality(shares: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """Names the shares of one block, (2, 2): query text, image x key text, image. NaN (never occurred) becomes None."""
    kinds = ("text", "image")
    return {
        f"{query} to {key}": None if math.isnan(share) else float(share)
        for query, row in zip(kinds, shares, strict=True)
        for key, share in zip(kinds, row, strict=True)
    }


def _row(kind: type[_Row], value: Mapping[str, Any], where: str) -> _Row:
    _check_keys(kind, value, where)
    return kind(**{name: tuple(part) if isinstance(part, list) else part for name, part in value.items()})


def _check_keys(kind: type[Any], value: Mapping[str, Any], where: str) -> None:
    needed = {item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING}
    wrong = sorted((needed - set(value)) | (set(value) - {item.name for item in fields(kind)}))
    if wrong:
        raise IntegrityError(f"report.json: {where}: missing or unknown keys: {', '.join(wrong)}")


def finite(value: Any, where: str) -> Any:
    """The value for JSON: tuples become lists, and what is not finite becomes null, with a warning that names it."""
    if isinstance(value, dict):
        return {key: finite(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item, f"{where}.{number}") for number, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        _log.warning("report: %s is %s and is written as null", where, value)
        return None
    return value
