"""The linears of a group, shared out among the processes of a run, and what each has made given to all."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from casp_pl.layers import LowRankLinear, QuantizedLinear
from casp_pl.layers.build import build_layer
from casp_pl.processes import of_all, process_count, process_rank

__all__ = ["are_uneven", "of_everyone", "own_share", "shared_out"]

Layer = QuantizedLinear | LowRankLinear
R = TypeVar("R")

_LOSS_INSIDE = 1.3  # of a linear of a 135M model that two processes make together; large ones lose less


def shared_out(costs: Mapping[str, float], processes: int) -> list[list[str]]:
    """The names of each process: the costliest first, always to the one with the least to do."""
    names: list[list[str]] = [[] for _ in range(processes)]
    loads = [0.0] * processes
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        rank = loads.index(min(loads))
        names[rank].append(name)
        loads[rank] += costs[name]
    return names


def are_uneven(costs: Mapping[str, float]) -> bool:
    """Whether these linears go faster if all processes make every one of them together, not each process its own.

    Args:
        costs: of each linear by name, in any unit; their sum is above 0.
    """
    loads = [sum(costs[name] for name in names) for names in shared_out(costs, process_count())]
    return max(loads) * process_count() > _LOSS_INSIDE * sum(loads)


def own_share(costs: Mapping[str, float]) -> list[str]:
    """The names of this process, in the order of `costs`."""
    own = shared_out(costs, process_count())[process_rank()]
    return [name for name in costs if name in own]


def of_everyone(made: Mapping[str, tuple[Layer, R]], device: torch.device) -> dict[str, tuple[Layer, R]]:
    """Layers by name and what is said of each, of all processes; every process has copies of its own on `device`."""
    if process_count() == 1:
        return dict(made)
    sent = {name: (layer.spec(), _on_cpu(layer), report) for name, (layer, report) in made.items()}
    result: dict[str, tuple[Layer, R]] = {}
    for parts in of_all(sent):
        for name, (spec, tensors, report) in parts.items():
            layer: Any = build_layer(spec, device=device)
            layer.load_state_dict(tensors)
            result[name] = (layer, report)
    return result


def _on_cpu(layer: Layer) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in layer.state_dict().items()}
