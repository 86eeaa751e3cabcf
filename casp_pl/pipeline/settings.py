"""Everything a recipe says, as objects ready to use."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from casp_pl.callbacks import BitAllocation, LowRankAllocation
from casp_pl.callbacks.report import STAGE_NAMES
from casp_pl.data import CalibrationData
from casp_pl.data.evaluation import EvaluationData
from casp_pl.evaluation.scoring import AnswerRule
from casp_pl.models.compress import BlockQuantization
from casp_pl.models.load import ModelSource
from casp_pl.quantizers import Quantizer

__all__ = ["RunSettings"]


@dataclass
class RunSettings:
    """One parsed recipe.

    Attributes:
        name: name of the recipe.
        run_dir: where everything is written.
        seed: seed of every random choice.
        model: what is compressed.
        data: calibration samples.
        evaluation: test questions and held-out text.
        scoring: scores the answers.
        quantizer: what compresses.
        baseline: what it is compared with, without calibration; None for no baseline.
        baseline_bits: bits of the baseline.
        low_rank: chooses the ranks.
        bits: chooses the bits.
        quantization: the block-by-block pass.
        activations: where inputs of blocks are kept, see `ActivationStore`.
        calibration: arguments of `CalibrationModule`.
        block_tuning: `window`, how many blocks are tuned together, and arguments of `BlockwiseModule`; epochs 0
            leaves the stage out.
        end_to_end: arguments of `EndToEndModule`; steps 0 leaves the stage out.
        codebook_update: arguments of `CodebookUpdate`.
        trainer: arguments of `lightning.pytorch.Trainer`, for all stages.
        flat: the recipe as flat key -> value, what a resumed run is checked against.
        recipe: the recipe as YAML, for config.yaml.
        command: what was typed, for the report.
        verbose: whether to print everything.
    """

    name: str
    run_dir: Path
    seed: int
    model: ModelSource
    data: CalibrationData
    evaluation: EvaluationData
    scoring: AnswerRule
    quantizer: Quantizer
    baseline: Quantizer | None
    baseline_bits: int
    low_rank: LowRankAllocation
    bits: BitAllocation
    quantization: BlockQuantization
    activations: Literal["auto", "memory", "disk"] = "auto"
    calibration: dict[str, Any] = field(default_factory=dict)
    block_tuning: dict[str, Any] = field(default_factory=dict)
    end_to_end: dict[str, Any] = field(default_factory=dict)
    codebook_update: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    flat: dict[str, str] = field(default_factory=dict)
    recipe: str = ""
    command: str = ""
    verbose: bool = False

    @property
    def planned_stages(self) -> tuple[str, ...]:
        """Names of the stages that are evaluated, in order."""
        left_out = {
            "rtn": self.baseline is None,
            "block_tuned": self.block_tuning.get("epochs", 0) <= 0,
            "end_to_end": self.end_to_end.get("steps", 0) <= 0,
        }
        return tuple(name for name in STAGE_NAMES if not left_out.get(name, False))
