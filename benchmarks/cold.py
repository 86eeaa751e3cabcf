"""Quantization as it is timed: cold, for quantizers keep what they make of a second moment while that tensor lives.

A repeat on the same tensor would skip every factorisation. So each run gets a copy, made outside of the timed part.
"""

import statistics
from collections.abc import Collection

from torch import Tensor

from benchmarks.clock import timed
from casp_pl.layers import QuantizedLinear
from casp_pl.quantizers import Quantizer

__all__ = ["cold_median", "with_fresh_moments"]

Matrices = list[tuple[Tensor, Tensor]]


def with_fresh_moments(matrices: Collection[tuple[Tensor, Tensor]]) -> Matrices:
    """The same weights (O, I), and copies of the moments (I, I): matrices that share a tensor share its copy."""
    copies = {key: moment.clone() for key, moment in {id(moment): moment for _, moment in matrices}.items()}
    return [(weight, copies[id(moment)]) for weight, moment in matrices]


def cold_median(
    quantizer: Quantizer, weight: Tensor, second_moment: Tensor, repeats: int, bits: int = 2
) -> tuple[QuantizedLinear, float]:
    """What the last of so many runs on a matrix by itself makes, and the median of their CPU seconds."""
    runs = []
    for _ in range(repeats):
        moment = second_moment.clone()
        layer, seconds = timed(lambda: quantizer.quantize(weight, moment, bits=bits))  # noqa: B023
        runs.append(seconds)
    return layer, statistics.median(runs)
