"""How the processes of a run share one training: every process the whole model (DDP), or a part of it (FSDP)."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.futures import Future

from casp_pl.modules.sharding import Wrapping
from casp_pl.processes import process_count

__all__ = [
    "STRATEGIES",
    "chosen_wrapping",
    "plain_strategy",
    "repeatable_ddp",
    "several",
    "sharded_strategy",
    "wrapping_of",
]

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


def repeatable_ddp() -> DDPStrategy:
    """Lightning's DDP, in which a step gives the same wherever a run was stopped."""
    return _RepeatableDDP(forward_sync_buffers=False)  # codes are buffers, the same everywhere: nothing to send around


class _RepeatableDDP(DDPStrategy):
    """DDP puts gradients together anew after the first step, and with three or more processes a sum depends on that.

    So each gradient is summed by itself. What is trained are a few hundred small tensors.
    """

    def configure_ddp(self) -> None:
        """As DDP does, with our sums."""
        super().configure_ddp()
        model: Any = self.model
        model.register_comm_hook(None, _each_alone)


def _each_alone(_: None, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]  # not in its stubs
    """The mean over processes of every gradient in a bucket, in place: the bucket's buffer (numbers,)."""
    mean = bucket.buffer().div_(process_count())
    sums: list[Any] = [dist.all_reduce(gradient, async_op=True) for gradient in bucket.gradients()]
    for work in sums:
        work.wait()  # on a GPU its stream does; a future made of theirs would forget their devices and not wait at all
    done: Future[Tensor] = Future(devices=[mean.device] if mean.is_cuda else None)
    done.set_result(mean)
    return done


class _FSDPAnywhere(FSDPStrategy):
    """Lightning refuses FSDPStrategy, but no class derived from it, on CPUs."""
