"""Put compressed layers into a module, and tell which are there."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from casp_pl.layers import LowRankLinear, QuantizedLinear, build_layer

__all__ = ["block_from_tensors", "compressed_layers", "install_layers", "layer_specs", "round_to_storage"]


def compressed_layers(module: nn.Module) -> dict[str, "QuantizedLinear | LowRankLinear"]:
    """The outermost compressed layers by name: a low-rank layer counts once, not by its factors."""
    found: dict[str, QuantizedLinear | LowRankLinear] = {}
    for name, layer in module.named_modules():
        inside = any(name.startswith(other + ".") for other in found)
        if isinstance(layer, QuantizedLinear | LowRankLinear) and not inside:
            found[name] = layer
    return found


def layer_specs(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Name -> spec of every compressed layer; `install_layers` makes the same structure from it."""
    return {name: layer.spec() for name, layer in compressed_layers(module).items()}


def install_layers(module: nn.Module, specs: Mapping[str, dict[str, Any]]) -> None:
    """Replace the named linears by empty layers of these specs, in place."""
    for name, spec in specs.items():
        module.set_submodule(name, build_layer(spec))


def block_from_tensors(original: nn.Module, specs: Mapping[str, dict[str, Any]], tensors: Mapping[str, Tensor]) -> nn.Module:
    """A compressed copy of `original` with the given layers and all of its tensors loaded."""
    block = copy.deepcopy(original)
    install_layers(block, specs)
    block.load_state_dict(dict(tensors))
    return block.eval().requires_grad_(False)


def round_to_storage(module: nn.Module) -> None:
    """Round the tables of all compressed layers to what a file holds, in place."""
    for layer in compressed_layers(module).values():
        layer.round_to_storage()
