"""How the processes of a run share one training: every process the whole model (DDP), or a part of it (FSDP)."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy

from casp_pl.modules.sharding import Wrapping
from casp_pl.processes import process_count

__all__ = ["STRATEGIES", "chosen_wrapping", "plain_strategy", "several", "sharded_strategy", "wrapping_of"]

_SHARDED: dict[str, Wrapping] = {"fsdp": "fsdp", "fsdp2": "fsdp2"}
STRATEGIES = ("auto", "ddp", *_SHARDED)
"""Names for `trainer.strategy` with several processes."""


def several(settings: Mapping[str, Any]) -> bool:
    """Whether these settings of a Trainer ask for several processes."""
    return settings.get("devices") not in (1, "1", None) or int(settings.get("num_nodes") or 1) > 1


def chosen_wrapping(settings: Mapping[str, Any]) -> Wrapping | None:
    """How the end-to-end stage is to divide the model, before the processes are started; None for not at all."""
    return _SHARDED.get(str(settings.get("strategy"))) if several(settings) else None


def wrapping_of(settings: Mapping[str, Any]) -> Wrapping | None:
    """How the end-to-end stage divides the model; None where every process holds all of it, as a single one does."""
    return _SHARDED.get(str(settings.get("strategy"))) if process_count() > 1 else None


def plain_strategy(settings: Mapping[str, Any]) -> Any:
    """`trainer.strategy` as a single process takes it."""
    chosen = settings.get("strategy") or "auto"
    return "auto" if chosen in _SHARDED else chosen


def sharded_strategy(wrapping: Wrapping) -> Strategy:
    """Lightning's strategy for a module that divides its parameters in `configure_model`."""
    if wrapping == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=process_count(), tensor_parallel_size=1)
    return _FSDPAnywhere()


class _FSDPAnywhere(FSDPStrategy):
    """Lightning refuses FSDPStrategy, but no class derived from it, on CPUs."""
