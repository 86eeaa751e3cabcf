"""Settings that a model divided among processes (FSDP) cannot have are refused before anything is computed."""

import torch

from casp_pl.errors import ConfigError
from casp_pl.pipeline.settings import RunSettings
from casp_pl.pipeline.strategies import chosen_wrapping
from casp_pl.pipeline.trainers import TrainerFactory

__all__ = ["check_divided"]


def check_divided(settings: RunSettings, *, streams: bool | None = None) -> None:
    """Nothing where the end-to-end stage is left out or every process holds the whole model.

    Args:
        settings: the recipe.
        streams: whether the model's blocks stay on disk; None before it is read, when the recipe's word counts.

    Raises:
        ConfigError: a setting that a divided model cannot have.
    """
    wrapping = chosen_wrapping(settings.trainer)
    if wrapping is None or settings.end_to_end.get("steps", 0) <= 0:
        return
    name = f"trainer.strategy {wrapping}"
    if settings.model.streaming if streams is None else streams:
        raise ConfigError(f"{name} does not work with model.streaming: set it to false, or take ddp.")
    if settings.end_to_end.get("update_codes"):
        raise ConfigError(f"{name} cannot change codes: set end_to_end.update_codes to false, or take ddp.")
    if settings.end_to_end.get("compile_backend") is not None:
        raise ConfigError(f"{name} does not compile blocks: set end_to_end.compile_backend to null, or take ddp.")
    if settings.model.dtype != "float32":
        raise ConfigError(f"{name} needs model.dtype float32, not {settings.model.dtype}; or take ddp.")
    trainers = TrainerFactory(settings.trainer, None)
    if trainers.autocast not in (None, torch.bfloat16):
        raise ConfigError(
            f"{name} computes in trainer.precision 32-true or bf16-mixed, not {trainers.working_precision}."
        )
