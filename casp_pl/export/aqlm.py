"""The layout of the package aqlm, which stock transformers loads (arXiv 2401.06118; transformers' AqlmConfig).

A linear is `codes` (O, G, K) as signed integers, `codebooks` (K, C, 1, D), `scales` (O, 1, 1, 1) and `bias`. The config
holds one K, C and D for the whole model.
"""

from typing import Any

import torch
from torch import nn

from casp_pl.checkpoint.layouts import StoredTensors
from casp_pl.errors import ConfigError
from casp_pl.export.tensors import layers_of_kind
from casp_pl.layers import AdditiveLinear

__all__ = ["to_aqlm"]


def to_aqlm(model: Any) -> dict[str, Any]:
    """Replace all additive layers by their tensors in aqlm's layout, in place; returns the quantization_config.

    Raises:
        ConfigError: a layer of another kind, formats that differ, or a width that the group length does not divide.
    """
    layers = layers_of_kind(model, AdditiveLinear, "aqlm", "AQLMQuantizer")
    formats = {name: (layer.num_codebooks, layer.entries, layer.group_length) for name, layer in layers.items()}
    _check_uniform(formats)
    for name, layer in layers.items():
        if layer.in_features % layer.group_length:
            raise ConfigError(f"{name}: aqlm needs widths that {layer.group_length} divides, not {layer.in_features}.")
    num_codebooks, entries, group_length = next(iter(formats.values()))
    dense = _dense_prefixes(model, set(layers))
    for name, layer in layers.items():
        codes = layer.codes_unpacked().to(torch.int16)
        tensors = {
            "codes": torch.where(codes >= entries // 2, codes - entries, codes).to(torch.int8),
            "codebooks": layer.codebooks.unsqueeze(2),
            "scales": layer.scales[:, :, None, None],
            "bias": layer.bias,
        }
        model.set_submodule(name, StoredTensors(tensors))
    return {
        "quant_method": "aqlm",
        "in_group_size": group_length,
        "out_group_size": 1,
        "num_codebooks": num_codebooks,
        "nbits_per_codebook": entries.bit_length() - 1,
        "linear_weights_not_to_quantize": dense,
    }


def _check_uniform(formats: dict[str, tuple[int, int, int]]) -> None:
    first = next(iter(formats))
    for name, sizes in formats.items():
        if sizes != formats[first]:
            raise ConfigError(
                f"aqlm's config holds one format for all layers, but {first} has {formats[first]} (codebooks, entries,"
                f" length) and {name} {sizes}.\nExport as dense or casp, or compress with --bits.score uniform, a whole"
                " --bits.budget and one format in quantizer.formats."
            )


def _dense_prefixes(model: Any, compressed: set[str]) -> list[str]:
    """The shortest module names that hold all dense linears and no compressed one, as transformers matches them."""
    prefixes: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or any(name.startswith(prefix) for prefix in prefixes):
            continue
        parts = name.split(".")
        candidates = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
        prefixes.append(
            next(c for c in candidates if not any(other == c or other.startswith(c + ".") for other in compressed))
        )
    return prefixes
