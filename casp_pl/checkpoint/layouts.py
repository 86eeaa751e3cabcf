"""What a model's config says of every tensor in its files: name, shape, type, and which numbers it may hold.

The layouts are that of this package and those of the exports. Letters: O out, I in, G groups, K codebooks, C entries of
a codebook, D group length.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from casp_pl.checkpoint.hugging_face import empty_model
from casp_pl.checkpoint.model_directory import QUANT_METHOD, checked_modules, quantization_of
from casp_pl.checkpoint.stored_names import names_in_files, state_without_aliases
from casp_pl.errors import ConfigError, IntegrityError
from casp_pl.layers import UniformLinear
from casp_pl.layers.uniform import column_groups_of, require_groups
from casp_pl.models.adapter import adapt
from casp_pl.models.surgery import install_layers

__all__ = ["Check", "ExpectedTensor", "StoredTensors", "column_checks", "expected_tensors"]

Check = Callable[[Tensor], object]  # raises IntegrityError where the numbers cannot be

_WORD = 32


@dataclass(frozen=True)
class ExpectedTensor:
    """What a file must hold of a tensor.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor; one of numbers with a point may be stored as any such type of 16 or 32 bits.
        check: of its numbers; None where any finite ones will do.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    check: Check | None = None


class StoredTensors(nn.Module):
    """Stands at a layer's place and gives the state dict its names; it holds tensors and computes nothing.

    Args:
        tensors: name to tensor; None is left out of the state dict.
    """

    def __init__(self, tensors: Mapping[str, Tensor | None]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach().contiguous())


def expected_tensors(directory: Path) -> dict[str, ExpectedTensor]:
    """Every tensor that the files of a model directory hold, by its name there, as config.json says.

    Raises:
        IntegrityError: the config describes no model, or no layout that this package writes.
    """
    model, quantization = empty_model(directory), quantization_of(directory)
    checks: dict[str, Check] = {}
    if quantization is not None:
        method = str(quantization.get("quant_method"))
        if method not in _LAYOUTS:
            raise IntegrityError(f"quantization_config: quant_method '{method}' is none of {', '.join(_LAYOUTS)}.")
        try:
            checks = _LAYOUTS[method](model, quantization)
        except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError, re.error, ConfigError) as error:
            raise IntegrityError(f"quantization_config of {method} is broken: {error!r}.") from error
    state = state_without_aliases(model)
    by_tensor = {id(state[name]): check for name, check in checks.items()}
    return {
        name: ExpectedTensor(tuple(tensor.shape), tensor.dtype, by_tensor.get(id(tensor)))
        for name, tensor in names_in_files(model, state).items()
    }


def column_checks(module: nn.Module) -> dict[str, Check]:
    """Name to check of the stored groups of all regrouped layers."""
    return {
        f"{name}.column_groups".removeprefix("."): partial(
            column_groups_of, in_features=layer.in_features, group_size=layer.group_size
        )
        for name, layer in module.named_modules()
        if isinstance(layer, UniformLinear) and layer.column_groups is not None
    }


def _casp(model: Any, quantization: Mapping[str, Any]) -> dict[str, Check]:
    install_layers(model, checked_modules(quantization.get("modules"), quantization.get("version")))
    return column_checks(model)


def _aqlm(model: Any, quantization: Mapping[str, Any]) -> dict[str, Check]:
    """Put `codes` (O, G, K), `codebooks` (K, C, 1, D) and `scales` (O, 1, 1, 1) at the place of every linear named."""
    dense = [f"{name}." for name in quantization["linear_weights_not_to_quantize"]]
    length, codebooks = quantization["in_group_size"], quantization["num_codebooks"]
    entries = 2 ** quantization["nbits_per_codebook"]
    checks: dict[str, Check] = {}
    linears = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    for name, linear in linears.items():
        if f"{name}.".startswith(tuple(dense)):
            continue
        groups = -(-linear.in_features // length)
        tensors = {
            "codes": _empty(linear.out_features, groups, codebooks, dtype=torch.int8),
            "codebooks": _empty(codebooks, entries, 1, length),
            "scales": _empty(linear.out_features, 1, 1, 1),
            "bias": linear.bias,
        }
        model.set_submodule(name, StoredTensors(tensors))
        checks[f"{name}.codes"] = partial(_require_range, low=-(entries // 2), high=(entries + 1) // 2 - 1)
    return checks


def _gptq(model: Any, quantization: Mapping[str, Any]) -> dict[str, Check]:
    """Put `qweight` (I bits / 32, O), `qzeros` (G, O bits / 32), `scales` and `g_idx` (I,) at every decoder linear."""
    checks: dict[str, Check] = {}
    for name, linear in _decoder_linears(model):
        settings = {**quantization, **_dynamic(quantization.get("dynamic") or {}, name)}
        bits, group_size = settings["bits"], settings["group_size"]
        group_size = linear.in_features if group_size == -1 else group_size  # whole rows
        groups = -(-linear.in_features // group_size)
        tensors = {
            "qweight": _empty(linear.in_features * bits // _WORD, linear.out_features, dtype=torch.int32),
            "qzeros": _empty(groups, linear.out_features * bits // _WORD, dtype=torch.int32),
            "scales": _empty(groups, linear.out_features),
            "g_idx": _empty(linear.in_features, dtype=torch.int32),
            "bias": linear.bias,
        }
        model.set_submodule(name, StoredTensors(tensors))
        checks[f"{name}.g_idx"] = partial(require_groups, group_size=group_size)
    return checks


_LAYOUTS: dict[str, Callable[[Any, Mapping[str, Any]], dict[str, Check]]] = {
    QUANT_METHOD: _casp,
    "aqlm": _aqlm,
    "gptq": _gptq,
}


def _decoder_linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    adapter = adapt(model)
    for number in range(len(adapter.blocks)):
        for name in adapter.linear_names:
            full = adapter.full_name(number, name)
            yield full, model.get_submodule(full)


def _dynamic(rules: Mapping[str, Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """What `dynamic` says of a module: the first rule that matches, as gptqmodel reads them."""
    return next((rule for pattern, rule in rules.items() if re.match(pattern.removeprefix("+:"), name)), {})


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _require_range(numbers: Tensor, low: int, high: int) -> None:
    least, most = int(numbers.min()), int(numbers.max())
    if least < low or most > high:
        raise IntegrityError(f"it holds numbers from {least} to {most}, outside {low} .. {high}")
