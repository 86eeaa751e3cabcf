"""GPTQ: uniform codes, rounded column by column with error feedback (arXiv 2210.17323).

Relative proxy loss at 2 | 3 bits in groups of 64, geometric mean over the 14 linears of blocks 0 and 15 of
SmolLM2-135M, second moments of 8k tokens; round to nearest 0.1207 | 0.0258:

    order          grid = range       grid searched      static, range      static, searched
    none           0.0340 | 0.0053    0.0161 | 0.0038    0.0308 | 0.0054    0.0199 | 0.0043
    group_aware    0.0258 | 0.0041    0.0140 | 0.0032    0.0225 | 0.0041    0.0156 | 0.0035
    activation     0.0221 | 0.0035    0.0125 | 0.0028    0.0189 | 0.0034    0.0134 | 0.0030

Searching grids in the conditional metric (what an error costs after later columns have made up for it) is about
7 % better than by the diagonal of H. Time hardly depends on the settings: 2 s for the 14, one thread.

Letters: O out, I in, G groups a row, D group size.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from casp_pl.errors import ConfigError
from casp_pl.layers.uniform import UniformLinear
from casp_pl.processes import RowShare
from casp_pl.quantizers.base import Quantizer
from casp_pl.quantizers.gptq_codes import ColumnOrder, OrderedFeedback, gptq_codes, live_columns, ordered_feedback
from casp_pl.quantizers.name_parts import names_with, setting_of
from casp_pl.quantizers.shared import MadeOfMoment
from casp_pl.quantizers.uniform_grids import check_scales

__all__ = ["GPTQQuantizer"]


class GPTQQuantizer(Quantizer):
    """Rounds a weight column by column; what one column does wrong the later ones make up for.

    Zero points are integers of `bits` bits, scales float16: 2 bits in groups of 64 cost 2.28 bits a weight in all, and
    storing the groups of the columns (see `order`) another log2(G) / O. Weights of dead columns, inputs that were 0 in
    every calibration token, become 0, unless all are dead.

    Args:
        group_size: D, weights of a row that share a scale and a zero point.
        group_sizes: other group sizes, of every linear with a part of a name in it, words between dots
            (`mlp.down_proj: 128`, `layers.0: 32`; the last that fits counts). Linears that read one input share its
            factorisation only where their group sizes are the same.
        order: in which columns are rounded: `none` from left to right; `activation` the loudest inputs first, which is
            best; `group_aware` whole groups first, then columns inside their group. With `activation` a group is any D
            columns, and which ones is stored, unless `static_groups`.
        static_groups: whether groups are runs of columns with grids made before anything is rounded. Then `activation`
            stores no groups.
        scale_search: whether a grid may clip outliers where that lowers the error.
        damping: added to the diagonal of the second moment, relative to its mean; raised where that is not enough.

    Raises:
        ConfigError: a setting is out of range.
    """

    name = "gptq"
    levels = (2, 3, 4, 8)
    layer = UniformLinear

    def __init__(
        self,
        *,
        group_size: int = 64,
        group_sizes: dict[str, int] | None = None,
        order: ColumnOrder = "activation",
        static_groups: bool = False,
        scale_search: bool = True,
        damping: float = 1e-2,
    ) -> None:
        if group_size < 1:
            raise ConfigError(f"gptq: group_size must be at least 1, not {group_size}")
        for part, size in (group_sizes or {}).items():
            if size < 1:
                raise ConfigError(f"gptq: group_sizes must be at least 1, not {size} for '{part}'")
        if order not in get_args(ColumnOrder):
            raise ConfigError(f"gptq: order must be one of {', '.join(get_args(ColumnOrder))}, not {order}")
        if not 0 <= damping < float("inf"):
            raise ConfigError(f"gptq: damping must be at least 0, not {damping}")
        self.group_size = group_size
        self.group_sizes: Mapping[str, int] = group_sizes or {}
        self.order: ColumnOrder = order
        self.static_groups = static_groups
        self.scale_search = scale_search
        self.damping = damping
        self.rank_grain = 8  # so many codes fill whole bytes; a whole group is more than a small W_k can spare
        self._inputs = MadeOfMoment[OrderedFeedback]()
        self._variants: dict[int, GPTQQuantizer] = {}

    def for_module(self, name: str) -> "GPTQQuantizer":
        """See `Quantizer.for_module`: one with the group size of that linear, the same for all that have that size."""
        size = setting_of(name, self.group_sizes, self.group_size)
        if size == self.group_size:
            return self
        if size not in self._variants:
            variant = self._variants[size] = copy.copy(self)  # shares what was made of second moments
            variant.group_size, variant.group_sizes = size, {}
        return self._variants[size]

    def check_names(self, names: Sequence[str]) -> None:
        """See `Quantizer.check_names`."""
        for part in self.group_sizes:
            names_with(part, names, "quantizer.group_sizes")

    @torch.no_grad()
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
        """See `Quantizer.quantize`. Deterministic: the generator is not used. Computes on the weight's device."""
        self._check_inputs(weight, second_moment, bits)
        moment = second_moment.to(weight.device)
        settings = (self.group_size, self.order, self.static_groups, self.damping)
        share = RowShare.of_products(len(weight), together)
        found = gptq_codes(
            weight[share.own].to(torch.float32),
            self._inputs.get(moment, settings, lambda: ordered_feedback(moment, *settings)),
            bits=bits,
            group_size=self.group_size,
            static_groups=self.static_groups,
            scale_search=self.scale_search,
        )
        codes, zeros, scales = (share.join(part) for part in found[:3])
        check_scales(weight, scales, found.column_groups, live_columns(moment.diagonal()))
        return UniformLinear.from_codes(
            codes,
            zeros,
            scales,
            bits=bits,
            group_size=self.group_size,
            column_groups=found.column_groups if self._regroups(weight.shape[1]) else None,
            bias=bias,
        )

    def _structure(self, out_features: int, in_features: int, bits: int) -> dict[str, Any]:
        regrouped = {"regrouped": True} if self._regroups(in_features) else {}
        return {"bits": bits, "group_size": self.group_size, **regrouped}

    def _regroups(self, in_features: int) -> bool:
        """Whether groups are other than runs of columns and have to be stored."""
        return self.order == "activation" and not self.static_groups and in_features > self.group_size
