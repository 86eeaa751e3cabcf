"""Put compressed layers into a module, and tell which are there."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from casp_pl.errors import IntegrityError
from casp_pl.layers import LowRankLinear, QuantizedLinear, build_layer

__all__ = [
    "block_from_tensors",
    "compressed_layers",
    "install_layers",
    "layer_specs",
    "require_storable",
    "round_to_storage",
    "skeleton_of",
]


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


def install_layers(model: nn.Module, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the linears of a model by empty layers, in place, on their device; dtypes are those of `build_layer`.

    Names are those of the whole model in memory; a model loaded without its head (or with one more around it) is found
    by leaving out (or adding) its base prefix.

    Args:
        model: with an `nn.Linear` at every name.
        modules: full module name to spec.

    Raises:
        IntegrityError: there is no such linear, or it has another shape.
    """
    for name, spec in modules.items():
        path = _locate(model, name)
        linear = model.get_submodule(path)
        given = (spec.get("out_features"), spec.get("in_features"), spec.get("bias"))
        if not isinstance(linear, nn.Linear):
            raise IntegrityError(
                f"quantization_config: {name} is a {type(linear).__name__} in this model, not a linear."
            )
        wanted = (linear.out_features, linear.in_features, linear.bias is not None)
        if given != wanted:
            raise IntegrityError(f"quantization_config: {name} is {given} (out, in, bias), in this model {wanted}.")
        layer = build_layer(dict(spec), device=linear.weight.device, dtype=linear.weight.dtype)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.train(linear.training))


def skeleton_of(module: nn.Module) -> nn.Module:
    """A copy whose stored tensors are on the meta device: the structure without the numbers.

    Buffers that no file holds keep their numbers, and model configs are shared with the copy.
    """
    memo: dict[int, Any] = {}
    for tensor in module.state_dict(keep_vars=True).values():
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    configs = (vars(part).get("config") for part in module.modules())
    memo |= {id(config): config for config in configs if config is not None}  # it says which attention is computed
    return copy.deepcopy(module, memo)


def block_from_tensors(
    original: nn.Module, specs: Mapping[str, dict[str, Any]], tensors: Mapping[str, Tensor], device: torch.device
) -> nn.Module:
    """A compressed block with the structure of `original`, the given layers, and all of its tensors loaded."""
    block = skeleton_of(original)
    install_layers(block, specs)
    block.load_state_dict(dict(tensors), assign=True)
    return block.to(device).eval().requires_grad_(False)


def round_to_storage(module: nn.Module) -> None:
    """Round the tables of all compressed layers to what a file holds, in place."""
    for layer in compressed_layers(module).values():
        layer.round_to_storage()


def require_storable(module: nn.Module) -> None:
    """Raises what `round_to_storage` would raise, NumericsError where a table is NaN or beyond float16."""
    for layer in compressed_layers(module).values():
        copy.deepcopy(layer).round_to_storage()


def _locate(model: nn.Module, name: str) -> str:
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    present = {path for path, _ in model.named_modules()}
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in present:
            return candidate
    raise IntegrityError(f"quantization_config: this {type(model).__name__} has no module {name}.")
