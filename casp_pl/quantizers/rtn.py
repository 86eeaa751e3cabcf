"""Round to nearest: the baseline that every report shows. Letters: O out, I in, G groups a row, D group size."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from casp_pl.errors import ConfigError
from casp_pl.layers.uniform import UniformLinear
from casp_pl.quantizers.base import Quantizer
from casp_pl.quantizers.uniform_grids import check_scales, nearest_codes, range_grid

__all__ = ["RTNQuantizer", "round_to_grid"]


class RTNQuantizer(Quantizer):
    """Every group of a row gets a grid from its smallest to its largest weight, every weight its nearest point.

    Zero is always on the grid. The second moment is checked but not used. Zero points are integers of `bits` bits,
    scales float16: 2 bits in groups of 64 cost 2.28 bits a weight in all.

    Args:
        group_size: D, weights of a row that share a scale and a zero point.
    """

    name = "rtn"
    levels = (2, 3, 4, 8)
    layer = UniformLinear

    def __init__(self, *, group_size: int = 64) -> None:
        if group_size < 1:
            raise ConfigError(f"rtn needs a group_size of at least 1, not {group_size}")
        self.group_size = group_size
        self.rank_grain = 8

    def quantize(
        self,
        weight: Tensor,
        second_moment: Tensor,
        *,
        bits: int,
        bias: Tensor | None = None,
        generator: torch.Generator | None = None,
        together: bool = False,
    ) -> UniformLinear:
        """See `Quantizer.quantize`. Deterministic: the generator is not used. Takes too little time to share out."""
        self._check_inputs(weight, second_moment, bits)
        codes, zeros, scales = round_to_grid(weight.detach().to(torch.float32), bits, self.group_size)
        groups = torch.arange(weight.shape[1], device=weight.device) // self.group_size
        check_scales(weight.detach(), scales, groups)
        return UniformLinear.from_codes(codes, zeros, scales, bits=bits, group_size=self.group_size, bias=bias)

    def _structure(self, out_features: int, in_features: int, bits: int) -> dict[str, Any]:
        return {"bits": bits, "group_size": self.group_size}


def round_to_grid(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric min-max grid of every group and the nearest point of every weight.

    Args:
        weight: (O, I), float32.
        bits: the grid has 2**bits points.
        group_size: D.

    Returns:
        Codes (O, I) and zero points (O, G) as uint8, scales (O, G) as float32 values that float16 holds exactly.
    """
    rows, columns = weight.shape
    grouped = F.pad(weight, (0, -columns % group_size)).view(rows, -1, group_size)
    zeros, scales = range_grid(grouped.amin(dim=-1), grouped.amax(dim=-1), bits)
    codes = nearest_codes(grouped, zeros.unsqueeze(-1), scales.unsqueeze(-1), bits)
    return codes.flatten(1)[:, :columns].to(torch.uint8), zeros.to(torch.uint8), scales
