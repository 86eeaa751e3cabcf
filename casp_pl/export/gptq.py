"""The layout of GPTQ, which gptqmodel and, through it, transformers load (arXiv 2210.17323).

A linear is `qweight` (I bits / 32, O) and `qzeros` (G, O bits / 32) of int32 words, each column or row a little-endian
bit stream, `scales` (G, O), `g_idx` (I,), the group of every column, and `bias`. Version 1 stores every zero point less
one. Readers add the one back in whole words, where a zero borrows from its neighbours; at 3 bits, whose fields cross
words, in every field modulo 8. Version 2 stores zero points as they are.

Bits and group sizes by module (`dynamic`) are understood by gptqmodel's own loader; transformers' ignores them. That
loader takes version 1 with zero points only from itself. So version 2 is for gptqmodel, 1 for transformers and older
tools, and of one level.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from casp_pl.checkpoint.layouts import StoredTensors
from casp_pl.checkpoint.stored_names import names_in_files
from casp_pl.errors import ConfigError
from casp_pl.export.tensors import layers_of_kind
from casp_pl.kernels.packing import pack
from casp_pl.layers import UniformLinear

__all__ = ["to_gptq"]

_WIDTHS = (2, 3, 4, 8)
_GROUPS = (16, 32, 64, 128, 256, 512, 1024)  # that gptqmodel's kernels read, beside whole rows
_WHOLE_ROWS = -1
_WORD = 32


def to_gptq(model: Any, *, version: int) -> dict[str, Any]:
    """Replace all uniform layers by their tensors in GPTQ's layout, in place; returns the quantization_config.

    Layers that differ from the most frequent bits and group size are named in `dynamic`.

    Args:
        model: the compressed model.
        version: 1 or 2, of the zero points.

    Raises:
        ConfigError: a layer of another kind, of bits or a shape that fills no whole 32-bit words, of groups that no
            reader takes; or version 1 of layers that differ.
    """
    layers = layers_of_kind(model, UniformLinear, "gptq", "GPTQQuantizer")
    for name, layer in layers.items():
        _check_layer(name, layer)
    sizes = {name: (layer.bits, _group_size(layer)) for name, layer in layers.items()}
    (bits, group_size), _ = Counter(sizes.values()).most_common(1)[0]
    others = {name: size for name, size in sizes.items() if size != (bits, group_size)}
    if others and version == 1:
        name, size = next(iter(others.items()))
        raise ConfigError(
            f"gptq, version 1, holds one number of bits and one group size, but most linears have {(bits, group_size)},"
            f" {name} {size}.\nExport as gptq_v2, dense or casp."
        )
    regrouped = any(layer.column_groups is not None for layer in layers.values())
    for name, layer in layers.items():
        model.set_submodule(name, StoredTensors(_tensors(layer, version)))
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": regrouped,
        "sym": False,
        "lm_head": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    if others:
        config["dynamic"] = {
            _rule(name, stored): dict(zip(("bits", "group_size"), others[name], strict=True))
            for name, stored in _stored_names(model, others).items()
        }
    return config


def _stored_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Module names in memory -> the same in the model's files, where transformers calls some otherwise."""
    state = model.state_dict()
    stored = {id(tensor): name for name, tensor in names_in_files(model, state).items()}
    return {name: stored[id(state[f"{name}.qweight"])].removesuffix(".qweight") for name in names}


def _rule(name: str, stored: str) -> str:
    """The key of `dynamic` for one module; gptqmodel compares it with names in memory, others with those in files."""
    both = "|".join(re.escape(each) for each in dict.fromkeys((name, stored)))
    return f"+:^(?:{both})$"


def _group_size(layer: UniformLinear) -> int:
    return _WHOLE_ROWS if layer.group_size >= layer.in_features else layer.group_size


def _check_layer(name: str, layer: UniformLinear) -> None:
    rows, columns, bits = layer.out_features, layer.in_features, layer.bits
    if bits not in _WIDTHS:
        raise ConfigError(
            f"{name} has {bits} bits; gptq stores {', '.join(map(str, _WIDTHS))}. Export as dense or casp."
        )
    if rows * bits % _WORD or columns * bits % _WORD:
        raise ConfigError(
            f"{name} is {rows} x {columns}: at {bits} bits that fills no whole 32-bit words.\nExport as dense or casp."
        )
    if _group_size(layer) not in (*_GROUPS, _WHOLE_ROWS):
        raise ConfigError(
            f"{name} has groups of {layer.group_size}; readers of gptq take {', '.join(map(str, _GROUPS))} and whole"
            " rows.\nExport as dense or casp."
        )


def _tensors(layer: UniformLinear, version: int) -> dict[str, Tensor | None]:
    return {
        "qweight": _words(layer.codes_unpacked(), layer.bits).T,
        "qzeros": _zero_words(layer.zeros_unpacked().T.contiguous(), layer.bits, version),
        "scales": layer.scales.T,
        "g_idx": layer.column_groups_unpacked().to(torch.int32),
        "bias": layer.bias,
    }


def _zero_words(zeros: Tensor, bits: int, version: int) -> Tensor:
    """Zero points (G, O) -> int32 (G, O bits / 32)."""
    if version == 1 and bits == 3:
        return _words((zeros.int() - 1) % 8, bits)
    words = _words(zeros, bits)
    return words - _words(torch.ones_like(zeros), bits) if version == 1 else words


def _words(codes: Tensor, bits: int) -> Tensor:
    """(N, M) -> int32 (N, M bits / 32), every row a little-endian bit stream."""
    return pack(codes, bits).view(torch.int32).view(len(codes), -1)
