"""The Trainer of every stage: the user's settings plus what the stage itself needs."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from casp_pl.errors import ConfigError
from casp_pl.pipeline.launch import accelerator_type
from casp_pl.pipeline.strategies import plain_strategy, repeatable_ddp
from casp_pl.processes import process_count

__all__ = ["TrainerFactory", "as_loader", "require_free_keys", "require_one_half_type"]

_INSTEAD = {
    "accumulate_grad_batches": "data.batch_size is the batch of a step; what does not fit is halved.",
    "fast_dev_run": "For a quick try add --config configs/models/tiny.yaml.",
    "max_epochs": "Set block_tuning.epochs.",
    "max_steps": "Set end_to_end.steps.",
    "logger": "Losses go to tensorboard/ in the run's directory.",
    "enable_checkpointing": "Set end_to_end.checkpoint_every.",
} | dict.fromkeys(
    ("overfit_batches", "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"),
    "Set data.samples, data.fine_tuning_samples, evaluation.questions or evaluation.text_tokens.",
)
_AUTOCAST = {
    "None": None, "32": None, "32-true": None,
    "bf16": torch.bfloat16, "bf16-mixed": torch.bfloat16,
    "16": torch.float16, "16-mixed": torch.float16,
}  # fmt: skip
"""Names of a precision in which what is trained stays in float32 -> what matrices are multiplied in."""
_DECIDED_BY_STAGES = (
    *_INSTEAD, "min_epochs", "min_steps", "max_time", "val_check_interval", "check_val_every_n_epoch",
    "num_sanity_val_steps", "log_every_n_steps", "gradient_clip_val", "gradient_clip_algorithm",
    "enable_progress_bar", "enable_model_summary", "use_distributed_sampler", "reload_dataloaders_every_n_epochs",
    "barebones",
)  # fmt: skip


def require_free_keys(settings: Mapping[str, Any]) -> None:
    """Settings of a Trainer that the stages decide by themselves may not be given: they would be passed over, or worse.

    Raises:
        ConfigError: one is, or a precision in which what is trained would lose its digits.
    """
    if str(settings.get("precision")) not in _AUTOCAST:
        raise ConfigError(
            f"trainer.precision: {settings['precision']}, but what is trained stays in float32: take bf16-mixed or"
            " 16-mixed.\nA model in half precision is model.dtype: bfloat16 or float16."
        )
    defaults = inspect.signature(pl.Trainer).parameters
    for key in _DECIDED_BY_STAGES:
        if settings.get(key, defaults[key].default) != defaults[key].default:
            instead = _INSTEAD.get(key, "")
            raise ConfigError(f"trainer.{key}: every stage decides this by itself; leave it out.\n{instead}".rstrip())


def require_one_half_type(settings: Mapping[str, Any], weights: str) -> None:
    """A model in one half type cannot be computed under autocast to the other: torch.cat, for one, ends with an error.

    Source: `prioritize` in ATen/autocast_mode.h, the same for CPUs and GPUs.

    Args:
        settings: of the Trainer.
        weights: `model.dtype`.

    Raises:
        ConfigError: the model is in one half type, and its matrices are to be multiplied in the other.
    """
    autocast = _AUTOCAST[str(settings.get("precision"))]
    if weights != "float32" and autocast not in (None, getattr(torch, weights)):
        raise ConfigError(
            f"trainer.precision: {settings['precision']} does not go with model.dtype: {weights}.\n"
            "Leave trainer.precision out, or load the model in float32 or in the same half type."
        )


class TrainerFactory:
    """Makes one Trainer per stage from the same settings.

    Args:
        settings: keyword arguments of `lightning.pytorch.Trainer` from the config.
        logger: shared by all stages; None for no logging.
        callbacks: added to every stage.
        weights: the model's dtype by name, `model.dtype`.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        logger: Logger | None,
        callbacks: Sequence[pl.Callback] = (),
        *,
        weights: str = "float32",
    ) -> None:
        self.settings = settings
        self.weights = weights
        self.logger = logger
        self.callbacks = tuple(callbacks)

    @property
    def working_precision(self) -> Any:
        """Precision of all but evaluation: `trainer.precision`; without it bf16-mixed on a CPU that multiplies bf16.

        What is computed from activations (moments, spectra, codes, losses) stays in float32 in any case.
        There a training step takes half the time of fp32, and its gradient points the same way (cosine 0.9997 on the
        embedded model). CPUs without these instructions take seven to ten times as long in bf16 as in fp32. A float16
        model is computed as it is: torch does not mix the two.
        """
        chosen = self.settings.get("precision")
        if chosen is not None:
            return chosen
        on_cpu = accelerator_type(self.settings) == "cpu"
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
        return "bf16-mixed" if on_cpu and has_bf16 and self.weights != "float16" else None

    @property
    def autocast(self) -> torch.dtype | None:
        """What `working_precision` multiplies matrices in; None for the dtype of the weights."""
        return _AUTOCAST[str(self.working_precision)]

    def make(self, *, callbacks: Sequence[pl.Callback] = (), **overrides: Any) -> pl.Trainer:
        """A Trainer without Lightning's own progress bar, summary and checkpoints: the run has its own.

        Raises:
            ConfigError: Lightning refuses the settings (an unknown strategy, a missing accelerator).
        """
        own: dict[str, Any] = {
            "logger": self.logger if self.logger is not None else False,
            "callbacks": [*self.callbacks, *callbacks, *(self.settings.get("callbacks") or [])],
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "use_distributed_sampler": False,  # our loaders know of the processes themselves
        }
        own["strategy"] = plain_strategy(self.settings)
        if process_count() > 1:
            own["strategy"] = repeatable_ddp()
        try:
            trainer = pl.Trainer(**{**self.settings, **own, **overrides})
        except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"trainer: {reason}") from error
        # Lightning's handler of SIGTERM asks the other processes first, which may wait for this one, all of them in C
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        return trainer


def as_loader(batches: Sequence[dict[str, Any]]) -> DataLoader[Any]:
    """Batches in memory as one loader; Lightning takes a plain list for several loaders."""
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a sequence is dataset enough
