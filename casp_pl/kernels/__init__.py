"""The hot operations on codes. Each has a plain torch formula beside it, which is the oracle of its test."""

from casp_pl.kernels.additive import AdditiveIndex, dequantize_additive, dequantize_additive_reference
from casp_pl.kernels.divergence import head_divergence, head_divergence_reference
from casp_pl.kernels.nearest import nearest_entries, nearest_entries_reference
from casp_pl.kernels.packing import pack, packed_size, unpack
from casp_pl.kernels.uniform import UniformCodes, dequantize_uniform

__all__ = [
    "UniformCodes",
    "AdditiveIndex",
    "dequantize_additive",
    "dequantize_additive_reference",
    "dequantize_uniform",
    "head_divergence",
    "head_divergence_reference",
    "nearest_entries",
    "nearest_entries_reference",
    "pack",
    "packed_size",
    "unpack",
]
