"""Linear layers that keep their weight compressed."""

from casp_pl.layers.additive import AdditiveLinear
from casp_pl.layers.base import QuantizedLinear
from casp_pl.layers.build import CompressedLinear, build_layer
from casp_pl.layers.lattice import LatticeLinear
from casp_pl.layers.low_rank import LowRankLinear
from casp_pl.layers.materialize import materialized
from casp_pl.layers.uniform import UniformLinear

__all__ = [
    "AdditiveLinear",
    "CompressedLinear",
    "LatticeLinear",
    "LowRankLinear",
    "QuantizedLinear",
    "UniformLinear",
    "build_layer",
    "materialized",
]
