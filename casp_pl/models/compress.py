"""Compress one decoder block: low-rank W_q and W_k, every linear quantized, aimed at the original's output (method D).

The linears are done group by group in the order in which the block computes them, each on the inputs that the already
compressed part of the block gives it. Shapes: O out, I in, N tokens.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from casp_pl.allocation import ModulePlan
from casp_pl.layers import LowRankLinear, QuantizedLinear, materialized
from casp_pl.linalg import PropagationTarget, full_width_products, relative_proxy_loss
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.streams import BlockBatch, linear_inputs
from casp_pl.quantizers import Quantizer
from casp_pl.quantizers.low_rank import quantize_low_rank

__all__ = ["BlockQuantization", "LinearReport", "Moments", "collect_moments", "round_to_nearest"]


@dataclass(frozen=True)
class LinearReport:
    """What became of one linear: its relative proxy loss on the compressed prefix's inputs and its true cost.

    Its seconds are those of its quantization alone, without the moments and targets of its group.
    """

    name: str
    relative_proxy_loss: float
    bits_codes: float
    bits_total: float
    seconds: float


@dataclass(frozen=True)
class Moments:
    """Means over tokens: x_q x_q^T of what a linear reads now, and x x_q^T with what it reads in the original, x."""

    second: Tensor
    cross: Tensor


class BlockQuantization:
    """Settings of the block-by-block quantization.

    Args:
        propagation: alpha in 0..1, how far each linear aims at the original's output instead of at its own weight on
            the damaged inputs (QEP, arXiv 2504.09629); 0 switches it off.
        seed: seed of every random choice; each linear derives its own from it, so the order of work does not matter.
    """

    def __init__(self, *, propagation: float = 0.5, seed: int = 0) -> None:
        self.propagation = propagation
        self.seed = seed

    def compress_block(
        self,
        adapter: ModelAdapter,
        original: nn.Module,
        plans: Sequence[ModulePlan],
        quantizer: Quantizer,
        references: Sequence[Mapping[str, Tensor]],
        student: Sequence[BlockBatch],
    ) -> tuple[nn.Module, list[LinearReport]]:
        """A compressed copy of `original`.

        Args:
            adapter: tells the linears and their order.
            original: the block as it was.
            plans: of this block's linears, and of no others.
            quantizer: does the rounding.
            references: per batch what the first linear of every group reads in the original model, (N, I); see
                `run_blocks_seeing` and `ModelAdapter.group_heads`.
            student: inputs of this block behind the compressed prefix, the same batches.

        Returns:
            The block and one report per linear.
        """
        by_name = {name: plan for plan in plans for name in adapter.linear_names if plan.name.endswith("." + name)}
        if len(by_name) != len(adapter.linear_names) or len(plans) != len(by_name):
            raise ValueError(f"a block has {len(adapter.linear_names)} linears, these plans are of {len(plans)}")
        block = copy.deepcopy(original)
        reports = []
        for group in adapter.linear_groups:
            with materialized(block):  # all batches pass through what is compressed already
                moments = collect_moments(block, student, [reference[group[0]] for reference in references], group[0])
            targets = self._targets(block, group, moments)
            for name in group:
                start = time.perf_counter()
                linear = _dense_linear(block, name)
                layer = self._compress_linear(targets[name], linear.bias, by_name[name], quantizer, moments.second)
                block.set_submodule(name, layer)
                loss = relative_proxy_loss(linear.weight, layer.dequantize().detach(), moments.second)
                seconds = time.perf_counter() - start
                bits_codes, bits_total = layer.bits_per_weight_codes, layer.bits_per_weight
                reports.append(LinearReport(by_name[name].name, loss, bits_codes, bits_total, seconds))
        return block, reports

    def _targets(self, block: nn.Module, group: Sequence[str], moments: Moments) -> dict[str, Tensor]:
        """What each linear of a group, (O, I), aims at."""
        aim = PropagationTarget(moments.cross, moments.second, self.propagation)
        return {name: aim.of(_dense_linear(block, name).weight.float()) for name in group}

    def _compress_linear(
        self, target: Tensor, bias: Tensor | None, plan: ModulePlan, quantizer: Quantizer, moment: Tensor
    ) -> QuantizedLinear | LowRankLinear:
        # a name, not a position, seeds the linear: hash() differs between processes, a sum of bytes does not
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + sum(map(ord, plan.name)) + 7919 * plan.block)
        if plan.rank is None:
            return quantizer.quantize(target, moment, bits=plan.bits, bias=bias, generator=generator)
        return quantize_low_rank(target, moment, plan.rank, quantizer, bits=plan.bits, bias=bias, generator=generator)


@torch.no_grad()
def collect_moments(
    block: nn.Module, student: Sequence[BlockBatch], references: Sequence[Tensor], name: str
) -> Moments:
    """Moments of the linear `name`, mean over real tokens.

    Args:
        block: the block as far as it is compressed.
        student: its inputs behind the compressed prefix.
        references: per batch what the linear reads in the original, (N, I).
        name: the linear, relative to the block.
    """
    second = cross = torch.zeros(())
    tokens = 0
    for batch, reference in zip(student, references, strict=True):
        inputs = linear_inputs(block, batch, [name])[name].float()
        with full_width_products():
            second = second + inputs.T @ inputs
            cross = cross + reference.float().T @ inputs
        tokens += len(inputs)
    return Moments(second / tokens, cross / tokens)


@torch.no_grad()
def round_to_nearest(adapter: ModelAdapter, quantizer: Quantizer, bits: int) -> list[nn.Module]:
    """Compressed copies of all blocks without any calibration: the baseline of every report."""
    blocks = []
    for original in adapter.blocks:
        block = copy.deepcopy(original)
        for name in adapter.linear_names:
            linear = _dense_linear(block, name)
            identity = torch.eye(linear.in_features)
            block.set_submodule(name, quantizer.quantize(linear.weight, identity, bits=bits, bias=linear.bias))
        blocks.append(block)
    return blocks


def _dense_linear(block: nn.Module, name: str) -> nn.Linear:
    linear = block.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{name} is a {type(linear).__name__}, not a dense linear that could be compressed")
    return linear
