"""How the processes of a run share one training: every process the whole model (DDP), or a part of it (FSDP)."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy

from casp_pl.modules.sharding import Wrapping
from casp_pl.processes import process_count

__all__ = ["STRATEGIES", "plain_strategy", "sharded_strategy", "wrapping_of"]

_SHARDED: dict[str, Wrapping] = {"fsdp": "fsdp", "fsdp2": "fsdp2"}
STRATEGIES = ("auto", "ddp", *_SHARDED)
"""Names for `trainer.strategy` with several processes."""


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
