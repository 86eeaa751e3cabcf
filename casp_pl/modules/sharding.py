"""A model whose parameters are divided among processes: built block by block, trained, put together again.

FSDP (torch's FullyShardedDataParallel, and `fully_shard`, its successor) keeps of a parameter, its gradient and its
optimizer state one part a process, and gathers the parameters of a layer only while it computes. Codes are buffers:
every process has them all.

Both cut a flattened tensor into consecutive parts in the order of ranks. So a whole tensor is the concatenation of
everyone's parts, and a process's part of a parameter or of a moment is a plain tensor that can be saved as such.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.soundness import require_materialized
from casp_pl.models.streams import autocast_to
from casp_pl.modules.parameters import root_mean_square, trainable_parameters
from casp_pl.processes import of_all, sum_of_all

__all__ = [
    "ShardedStudent",
    "Sharding",
    "Student",
    "Wrapping",
    "build_sharded",
    "clip_gradients",
    "local",
    "own_parts",
    "parked",
    "plain_name",
    "trained_parts",
    "unwrapped",
    "whole_tensors",
]

Wrapping = Literal["fsdp", "fsdp2"]
_PIXELS = ("pixel_values", "pixel_values_videos")
_WRAPPED = "_fsdp_wrapped_module."


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing memory; of a tensor that is not divided, the tensor itself."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def plain_name(name: str) -> str:
    """The name of a parameter without what wrappers add to it."""
    return name.replace(_WRAPPED, "")


def trained_parts(module: nn.Module) -> dict[str, Tensor]:
    """This process's parts of the trained parameters, by their names without wrappers."""
    named = module.named_parameters()
    return {plain_name(name): local(part.detach()) for name, part in named if part.requires_grad}


def own_parts(module: nn.Module) -> dict[str, Tensor]:
    """All that training may change: `trained_parts`, and buffers (codes)."""
    return trained_parts(module) | {plain_name(name): buffer for name, buffer in module.named_buffers()}


def whole_tensors(parts: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Whole tensors on the CPU, in every process, from the parts that each has.

    Args:
        parts: of `trained_parts`.
        shapes: of the whole tensors.
    """
    # a view would be sent with all of the memory that it looks at
    everyones = of_all({name: part.flatten().cpu().clone() for name, part in parts.items()})
    return {name: torch.cat([own[name] for own in everyones]).view(shapes[name]) for name in parts}


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> None:
    """Scale the gradients of divided parameters so that the norm of all of them together is at most `limit`.

    What `torch.nn.utils.clip_grad_norm_` does of whole ones; Lightning's plugin for FSDP refuses it.
    """
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    squares = [gradient.double().square().sum() for gradient in gradients]
    device = gradients[0].device if gradients else None
    norm = sum_of_all(torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device))
    factor = (limit / (norm.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.dtype))


@dataclass(frozen=True)
class Sharding:
    """How a compressed model is to be divided.

    Attributes:
        wrapping: `fsdp` is FullyShardedDataParallel, `fsdp2` is `fully_shard`.
        read: number of a block -> the compressed block, whole and on the CPU.
        autocast: what the model multiplies matrices in; None for the dtype of its weights.
    """

    wrapping: Wrapping
    read: Callable[[int], nn.Module]
    autocast: torch.dtype | None = None


class Student(nn.Module):
    """The root of a divided model. Everything that reads its parameters happens inside `forward`.

    Args:
        adapter: the compressed copy.
        compute: (adapter, batch, further arguments) -> result.
        autocast: see `Sharding`.
    """

    def __init__(self, adapter: ModelAdapter, compute: Callable[..., Any], autocast: torch.dtype | None) -> None:
        super().__init__()
        self.model = adapter.model
        self.adapter = adapter
        self.compute = compute
        self.autocast = autocast

    def forward(self, batch: Mapping[str, Any], *arguments: Any) -> Any:
        """What `compute` returns."""
        with autocast_to(self.autocast, self.adapter.head.weight.device):
            self._join_vision(batch)
            return self.compute(self.adapter, batch, *arguments)

    @torch.no_grad()
    def _join_vision(self, batch: Mapping[str, Any]) -> None:
        """Every process calls the vision tower as often as the others, to gather it with them; blank images make up.

        A tower sees all images (or tiles) of a batch at once, and likewise all frames of its videos. Where only some
        processes call a divided layer, all of them wait forever.
        """
        pixels = [batch[name] for name in _PIXELS if batch.get(name) is not None]
        calls = of_all([tuple(image.shape[-3:]) for image in pixels])
        most = max(calls, key=len)
        head = self.adapter.head.weight
        for shape in most[len(pixels) :]:
            tower: Any = getattr(self.model, "model", self.model).vision_tower
            tower(torch.zeros(1, *shape, dtype=head.dtype, device=head.device))


class ShardedStudent(NamedTuple):
    """A divided model.

    Attributes:
        root: a `Student`, wrapped or not; to be called.
        blocks: its decoder blocks, whose parameters are trained.
        sizes: root mean square of every trained parameter as it was whole, by its name in `blocks` without wrappers.
    """

    root: nn.Module
    blocks: nn.ModuleList
    sizes: dict[str, float]


def build_sharded(
    adapter: ModelAdapter,
    sharding: Sharding,
    compute: Callable[..., Any],
    mesh: DeviceMesh | None,
    device: torch.device,
) -> ShardedStudent:
    """A compressed copy of a model, divided while it is built: no process ever holds two whole blocks of it.

    Everything but the blocks is copied as it is, frozen. Decoder blocks and the layers of the vision tower are gathered
    one at a time, the rest with the root.

    Args:
        adapter: the original.
        sharding: how.
        compute: see `Student`.
        mesh: of the processes, for `fsdp2`.
        device: where it computes.
    """
    with adapter.with_blocks([]) as hollow:
        require_materialized(hollow)
        model: Any = copy.deepcopy(hollow)
    twin = replace(adapter, model=model, decoder=model.get_submodule(adapter.decoder_name))
    sizes: dict[str, float] = {}
    for number in range(len(adapter.blocks)):
        block = sharding.read(number)
        require_materialized(block, adapter.full_name(number, ""))
        trainable_parameters(block)
        trained = ((name, p) for name, p in block.named_parameters() if p.requires_grad)
        sizes |= {f"{number}.{name}": root_mean_square(parameter) for name, parameter in trained}
        twin.blocks.append(_shard(block, sharding.wrapping, mesh, device))
    for layers in _other_layers(twin):
        for number, layer in enumerate(layers):
            layers[number] = _shard(layer, sharding.wrapping, mesh, device)
    root = _shard(Student(twin, compute, sharding.autocast), sharding.wrapping, mesh, device)
    return ShardedStudent(root, twin.blocks, sizes)


def unwrapped(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that compute, inside the wrappers of `fsdp`."""
    return [block.module if isinstance(block, FullyShardedDataParallel) else block for block in blocks]


@contextmanager
def parked(model: nn.Module) -> Iterator[None]:
    """Inside, the model lies in the memory of the host."""
    device = next(model.parameters()).device
    model.to("cpu")
    try:
        yield
    finally:
        model.to(device)


def _other_layers(adapter: ModelAdapter) -> list[nn.ModuleList]:
    """The outermost lists of layers beside the decoder's: those of a vision tower."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in adapter.model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in [*found, adapter.decoder_name])
        if isinstance(module, nn.ModuleList) and not inside:
            found[name] = module
    return list(found.values())


def _shard(module: nn.Module, wrapping: Wrapping, mesh: DeviceMesh | None, device: torch.device) -> nn.Module:
    """Divide what is not divided yet of a module whose parameters are whole and the same in every process."""
    if wrapping == "fsdp":
        return FullyShardedDataParallel(module, device_id=device, use_orig_params=True)
    fully_shard(module, mesh=mesh)
    return module
