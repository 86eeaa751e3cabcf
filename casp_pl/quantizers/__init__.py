"""Methods that turn a weight and a second moment into a compressed layer."""

from casp_pl.quantizers.aqlm import AQLMQuantizer
from casp_pl.quantizers.base import Quantizer
from casp_pl.quantizers.gptq import GPTQQuantizer
from casp_pl.quantizers.low_rank import quantize_low_rank
from casp_pl.quantizers.quip import QuIPSharpQuantizer
from casp_pl.quantizers.rtn import RTNQuantizer

__all__ = [
    "AQLMQuantizer",
    "GPTQQuantizer",
    "QuIPSharpQuantizer",
    "Quantizer",
    "RTNQuantizer",
    "quantize_low_rank",
]
