"""What every command needs before it can start: model, processor, data on the right device."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from casp_pl.allocation import CompressionPlan
from casp_pl.errors import ConfigError, InputError
from casp_pl.models.adapter import ModelAdapter, adapt
from casp_pl.models.digest import WeightDigest
from casp_pl.models.memory import Memory, free_memory
from casp_pl.models.skeleton import load_skeleton
from casp_pl.models.soundness import require_finite_weights
from casp_pl.models.streams import batch_on
from casp_pl.pipeline.blocks import Batches
from casp_pl.pipeline.launch import accelerator_type, sharing_processes
from casp_pl.pipeline.settings import RunSettings
from casp_pl.processes import process_count

__all__ = [
    "Prepared",
    "RunBatches",
    "fingerprint",
    "is_here",
    "load_batches",
    "load_original",
    "model_device",
    "on_device",
    "prepare",
    "prepare_outline",
    "wanted_device",
]

_NO_NUMBERS = frozenset({"_name_or_path", "transformers_version", "architectures", "image_processor_type"})


@dataclass(frozen=True)
class Prepared:
    """The original model, ready to be measured and compressed.

    Attributes:
        adapter: the model; an outline's is on the meta device, whatever `device` says.
        processor: of the model.
        device: where the model is computed.
        free: memory that each process had before any weight was loaded; None where `device` is not here.
        streamed: whether the decoder blocks stay on disk.
        predicted: the plan as far as it is known before calibration.
        headers: `Skeleton.headers`.
        weights: `WeightDigest` of all tensors; empty where nobody asked for it.
    """

    adapter: ModelAdapter
    processor: Any
    device: torch.device
    free: Memory | None
    streamed: bool
    predicted: CompressionPlan
    headers: Mapping[str, torch.dtype] | None
    weights: str = ""


def prepare(settings: RunSettings, *, digest: bool = False) -> Prepared:
    """`prepare_outline`, then `load_original`."""
    return load_original(settings, prepare_outline(settings), digest=digest)


def load_original(settings: RunSettings, outline: Prepared, *, digest: bool = False) -> Prepared:
    """The same with the model's weights.

    Args:
        settings: the recipe.
        outline: of `prepare_outline`.
        digest: take `Prepared.weights`; blocks on disk are read once for it and for the check of their values.

    Raises:
        InputError: the model cannot be read.
        NumericsError: a weight is NaN or infinite.
    """
    pl.seed_everything(settings.seed, verbose=False)
    adapter, weights = settings.model.open(outline.device, streamed=outline.streamed), WeightDigest()

    def check(part: nn.Module, prefix: str = "") -> None:
        require_finite_weights(part, prefix)
        if digest:
            weights.add(part, prefix)

    check(adapter.model)
    if outline.streamed:
        for number, block in enumerate(adapter.originals()):
            check(block, adapter.full_name(number, ""))
    return replace(outline, adapter=adapter, weights=weights.hexdigest() if digest else "")


def prepare_outline(settings: RunSettings, device: torch.device | None = None) -> Prepared:
    """Tell the data the model's processor, check the settings that need the model, decide whether to stream it.

    No weight is read. The processes of a run call this together.

    Args:
        settings: the recipe.
        device: where the model would be computed; None for where the trainer wants it, which has to be here.

    Returns:
        The model without its weights.

    Raises:
        ConfigError: no such device, or a budget that cannot be met.
        InputError: the model or the data cannot be read.
    """
    device = model_device(settings) if device is None else device
    skeleton = load_skeleton(settings.model)
    adapter = adapt(skeleton.model)
    free = free_memory(device, sharing_processes(settings.trainer)) if is_here(device) else None
    streamed = settings.model.streams(sum(parameter.nbytes for parameter in adapter.model.parameters()), free)
    settings.bits.attach(settings.quantizer, settings.low_rank)
    settings.data.attach(skeleton.processor)
    settings.evaluation.attach(skeleton.processor)
    # an impossible budget or rank is found now, not after an hour
    predicted = settings.bits.make_plan(adapter, settings.low_rank.choose(adapter, None), None)
    if settings.baseline is not None:
        settings.baseline.check_names([module.name for module in predicted.modules])
    return Prepared(adapter, skeleton.processor, device, free, streamed, predicted, skeleton.headers)


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
    """What a run's artifacts depend on: the recipe key by key, model and processor, samples, what it is judged on."""
    images = getattr(prepared.processor, "image_processor", None)
    return {
        "recipe": settings.flat,
        "model": prepared.weights,
        "model_config": _digest(prepared.adapter.model.config.to_diff_dict()),
        "image_processor": _digest({} if images is None else images.to_dict()),
        "data": settings.data.fingerprint,
        "evaluation": settings.evaluation.fingerprint,
    }


def _digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 of what decides numbers: not of where something was read, nor by which version."""
    told = {key: value for key, value in settings.items() if key not in _NO_NUMBERS}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def on_device(batches: Iterable[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """The batches in memory, their tensors on this device."""
    return [batch_on(device, batch) for batch in batches]
