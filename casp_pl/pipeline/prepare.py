"""What every command needs before it can start: model, processor, data on the right device."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from casp_pl.errors import ConfigError, InputError
from casp_pl.models.adapter import ModelAdapter, adapt
from casp_pl.models.skeleton import load_skeleton
from casp_pl.models.soundness import require_finite_weights
from casp_pl.pipeline.blocks import Batches
from casp_pl.pipeline.launch import accelerator_type
from casp_pl.pipeline.settings import RunSettings
from casp_pl.processes import process_count

__all__ = [
    "Prepared",
    "RunBatches",
    "fingerprint",
    "is_here",
    "load_batches",
    "model_device",
    "on_device",
    "prepare",
    "prepare_outline",
    "wanted_device",
]


@dataclass(frozen=True)
class Prepared:
    """The original model, ready to be measured and compressed."""

    adapter: ModelAdapter
    processor: Any
    device: torch.device


def prepare(settings: RunSettings) -> Prepared:
    """Load the model, tell the data its processor, check the settings that need the model.

    Raises:
        ConfigError: no such device, or a budget that cannot be met.
        InputError: the model or the data cannot be read.
        NumericsError: a weight is NaN or infinite.
    """
    pl.seed_everything(settings.seed, verbose=False)
    device = model_device(settings)
    adapter, processor = settings.model.open(device)
    require_finite_weights(adapter.model)
    if adapter.stored is not None:
        precision = str(settings.trainer.get("precision"))
        if precision.endswith("-true") and precision != "32-true":
            raise ConfigError(f"trainer.precision: {precision} does not reach blocks on disk; set model.dtype instead.")
        for number, block in enumerate(adapter.originals()):
            require_finite_weights(block, adapter.full_name(number, ""))
    return _prepared(settings, adapter, processor, device)


def prepare_outline(
    settings: RunSettings, device: torch.device | None = None
) -> tuple[Prepared, Mapping[str, torch.dtype] | None]:
    """As `prepare`, but no weight is read: the model is on the meta device, whatever `device` says.

    Args:
        settings: the recipe.
        device: where the model would be computed; None for where the trainer wants it, which has to be here.

    Returns:
        What `prepare` returns, and `Skeleton.headers`.

    Raises:
        ConfigError: no such device, or a budget that cannot be met.
        InputError: the model or the data cannot be read.
    """
    skeleton = load_skeleton(settings.model)
    device = model_device(settings) if device is None else device
    return _prepared(settings, adapt(skeleton.model), skeleton.processor, device), skeleton.headers


def _prepared(settings: RunSettings, adapter: ModelAdapter, processor: Any, device: torch.device) -> Prepared:
    settings.bits.attach(settings.quantizer, settings.low_rank)
    settings.data.attach(processor)
    settings.evaluation.attach(processor)
    # an impossible budget or rank is found now, not after an hour
    settings.bits.make_plan(adapter, settings.low_rank.choose(adapter, None), None)
    return Prepared(adapter, processor, device)


def model_device(settings: RunSettings) -> torch.device:
    """Where the recipe's trainer wants the model.

    Raises:
        ConfigError: there is no such device.
    """
    device = wanted_device(settings)
    if not is_here(device):
        raise ConfigError("trainer.accelerator: there is no GPU here; set it to cpu.")
    return device


def wanted_device(settings: RunSettings) -> torch.device:
    """Where the recipe's trainer wants the model, whether this machine has that device or not."""
    if accelerator_type(settings.trainer) == "cpu":
        return torch.device("cpu")
    # `launch` has chosen this process's own
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def is_here(device: torch.device) -> bool:
    """Whether this machine has such a device."""
    return device.type == "cpu" or torch.cuda.is_available()


@dataclass(frozen=True)
class RunBatches:
    """What a run is fitted on, in memory.

    Attributes:
        calibration: whole batches of this process, for moments.
        tuning: this process's share of each of all these batches, for gradients.
        held_back: its share of those that fine-tuning is stopped by.
    """

    calibration: Batches
    tuning: Batches
    held_back: Batches


def load_batches(settings: RunSettings, device: torch.device) -> RunBatches:
    """The batches of this process.

    Raises:
        InputError: there is none.
    """
    calibration = on_device(settings.data.calibration_dataloader(), device)
    tuning = calibration if process_count() == 1 else on_device(settings.data.tuning_dataloader(), device)
    held_back = on_device(settings.data.val_dataloader(), device)
    if not calibration:
        raise InputError("data: no sample is left to calibrate on; raise data.samples.")
    needs_held_back = settings.block_tuning.get("epochs", 0) > 0 or settings.end_to_end.get("steps", 0) > 0
    if needs_held_back and not held_back:
        raise InputError("data: fine-tuning needs samples held back; raise data.holdout or data.samples.")
    return RunBatches(calibration, tuning, held_back)


def fingerprint(settings: RunSettings, prepared: Prepared) -> dict[str, Any]:
    """What the artifacts of a run depend on: the recipe key by key, the model's weights, the samples."""
    return {"recipe": settings.flat, "model": _weight_sum(prepared.adapter), "data": settings.data.fingerprint}


def _weight_sum(adapter: ModelAdapter) -> str:
    """The sum of all absolute values, exactly as written; the same whether the model is streamed or not."""
    skeletons = [adapter.skeleton(number) for number in range(len(adapter.blocks))]
    with adapter.with_blocks(skeletons) as model:
        names = list(model.state_dict())
    with adapter.with_blocks([]) as model:
        sums = _sums(model.state_dict())
    for number, block in enumerate(adapter.originals()):
        sums |= {adapter.full_name(number, name): value for name, value in _sums(block.state_dict()).items()}
    total = torch.zeros((), dtype=torch.float64)
    for name in names:  # in this order, because the sum depends on it
        total += sums.get(name, 0.0)
    return float(total).hex()


def _sums(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    return {name: tensor.double().abs().sum().cpu() for name, tensor in floating.items()}


def on_device(batches: Iterable[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """The batches in memory, their tensors on this device."""
    return [
        {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        for batch in batches
    ]
