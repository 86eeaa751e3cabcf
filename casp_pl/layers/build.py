"""Empty layers from their specs, so that a compressed model can be built before its numbers are read."""

from typing import Any

import torch
from torch import nn

from casp_pl.errors import IntegrityError
from casp_pl.layers.additive import AdditiveLinear
from casp_pl.layers.base import QuantizedLinear
from casp_pl.layers.lattice import LatticeLinear
from casp_pl.layers.low_rank import LowRankLinear
from casp_pl.layers.uniform import UniformLinear

__all__ = ["CompressedLinear", "build_layer"]

CompressedLinear = QuantizedLinear | LowRankLinear | nn.Linear

_QUANTIZED: dict[str, type[QuantizedLinear]] = {cls.kind: cls for cls in (AdditiveLinear, LatticeLinear, UniformLinear)}


def build_layer(
    spec: dict[str, Any], *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> CompressedLinear:
    """The skeleton that a spec describes; codes and tables are zero.

    Args:
        spec: what `spec()` of a layer returned; kinds additive, lattice, uniform, low_rank and dense.
        device: where the tensors are made; None for torch's default.
        dtype: of dense factors; tables and biases of codes are at least float32, as in the run that made them.

    Raises:
        IntegrityError: unknown kind, or keys that do not belong to it.
    """
    settings = dict(spec)
    kind = settings.pop("kind", None)
    try:
        if kind == LowRankLinear.kind:
            return _low_rank(settings, device, dtype)
        if kind == "dense":
            return nn.Linear(**settings, device=device, dtype=dtype)
        if kind in _QUANTIZED:
            return _QUANTIZED[kind](**settings, device=device, dtype=torch.promote_types(dtype, torch.float32))
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"broken description of a layer of kind {kind}: {error}") from error
    raise IntegrityError(f"unknown kind of layer: {kind!r}; known are {', '.join([*_QUANTIZED, 'low_rank', 'dense'])}")


def _low_rank(settings: dict[str, Any], device: torch.device | str | None, dtype: torch.dtype) -> LowRankLinear:
    factors = [build_layer(settings[name], device=device, dtype=dtype) for name in ("input_factor", "output_factor")]
    first, second = factors
    if isinstance(first, LowRankLinear) or isinstance(second, LowRankLinear):
        raise ValueError("a factor is itself of low rank")
    layer = LowRankLinear(input_factor=first, output_factor=second)
    built = layer.spec()
    wrong = sorted(key for key in settings.keys() | built.keys() - {"kind"} if settings.get(key) != built.get(key))
    if wrong:
        raise ValueError(f"{', '.join(wrong)} contradict the factors")
    return layer
