"""Compress one decoder block: low-rank W_q and W_k, every linear quantized, aimed at the original's output (method D).

The linears are done group by group in the order in which the block computes them, each on the inputs that the already
compressed part of the block gives it. Each is kept as soon as it is there, so that a run that is killed inside a block
does it once only. Several processes share the linears of a group out among themselves: they all
have the same moments, and each linear comes out the same whoever makes it. Shapes: O out, I in, N tokens.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from casp_pl.allocation import ModulePlan
from casp_pl.errors import ConfigError, NumericsError
from casp_pl.layers import LowRankLinear, QuantizedLinear, materialized
from casp_pl.linalg import GramSum, ProductSum, PropagationTarget, full_width_products, relative_proxy_loss
from casp_pl.memory import trim_heap
from casp_pl.models.activations import Keep, in_memory
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.sharing import Layer, are_uneven, of_everyone, own_share
from casp_pl.models.streams import BlockBatch, closing_linears_of, linear_inputs, reach
from casp_pl.models.token_weights import energy_limit, root_weights
from casp_pl.processes import RowShare, process_count, sum_of_all
from casp_pl.quantizers import Quantizer
from casp_pl.quantizers.low_rank import quantize_low_rank

__all__ = [
    "BlockQuantization",
    "FinishedLinears",
    "LinearReport",
    "Moments",
    "NothingFinished",
    "collect_moments",
    "round_to_nearest",
]

_LARGE = 1 << 25  # bytes of a second moment: beside smaller ones little is freed that is not used again at once


@dataclass(frozen=True)
class LinearReport:
    """What became of one linear: its relative proxy loss on the compressed prefix's inputs and its true cost.

    Its seconds are those of its quantization alone, without the moments and targets of its group. A dead column is an
    input that was 0 in every calibration token.
    """

    name: str
    relative_proxy_loss: float
    bits_codes: float
    bits_total: float
    seconds: float
    dead_columns: int = 0


@dataclass(frozen=True)
class Moments:
    """Means over tokens of a x_q x_q^T (I, I) and a x x_q^T (I, I): x_q a linear reads now, x in the original.

    a is a token's weight, at most 1; see `token_weights`. `cross` is None where the original was not asked.
    """

    second: Tensor
    cross: Tensor | None


class FinishedLinears(Protocol):
    """Linears of one block that are done, by relative name."""

    def find(self, name: str) -> tuple[Layer, LinearReport] | None:
        """What became of a linear; None if it is not done."""

    def add(self, name: str, layer: Layer, report: LinearReport) -> None:
        """A linear is done."""


class NothingFinished:
    """Starts with no linear, and remembers none."""

    def find(self, name: str) -> None:
        """There is none."""

    def add(self, name: str, layer: Layer, report: LinearReport) -> None:
        """Nothing is kept."""


class BlockQuantization:
    """Settings of the block-by-block quantization.

    Args:
        propagation: alpha in 0..1, how far each linear aims at the original's output instead of at its own weight on
            the damaged inputs (QEP, arXiv 2504.09629); 0 switches it off.
        token_limit: how many times the typical |x|^2, the geometric mean, a token's may count in the moments of what a
            linear reads; None to let every token count as it is.
        seed: seed of every random choice; each linear derives its own from it, so the order of work does not matter.
    """

    def __init__(self, *, propagation: float = 0.5, token_limit: float | None = 16.0, seed: int = 0) -> None:
        if token_limit is not None and not token_limit > 0:
            raise ConfigError(f"quantization.token_limit must be above 0, or null for none, not {token_limit}")
        self.propagation = propagation
        self.token_limit = token_limit
        self.seed = seed

    @property
    def follows_original(self) -> bool:
        """Whether anything depends on what linears read in the original."""
        return self.propagation > 0

    def compress_block(
        self,
        adapter: ModelAdapter,
        original: nn.Module,
        plans: Sequence[ModulePlan],
        quantizer: Quantizer,
        references: Sequence[dict[str, Tensor]],
        student: Sequence[BlockBatch],
        finished: FinishedLinears | None = None,
        linear_done: Callable[[LinearReport, bool], None] | None = None,
        keep: Keep = in_memory,
    ) -> tuple[nn.Module, list[LinearReport], list[BlockBatch]]:
        """A compressed copy of `original`; the block itself where it was read from disk, see `ModelAdapter.own`.

        Args:
            adapter: tells the linears and their order.
            original: the block as it was.
            plans: of this block's linears, and of no others.
            quantizer: does the rounding.
            references: per batch what the first linear of every group reads in the original model, (N, I); see
                `run_blocks_seeing` and `ModelAdapter.group_heads`. Taken out of them group by group; not looked at
                unless `follows_original`.
            student: inputs of this block behind the compressed prefix, the same batches.
            finished: linears of this block that an earlier run made, and where those made now are kept.
            linear_done: is told of every linear of the block as it is done or found, and whether it was found.
            keep: keeps where the passes of `student` begin anew, and what is read more than once.

        Returns:
            The block, one report per linear, and `student`, whose pass through the whole block takes less now.
        """
        by_name = {name: plan for plan in plans for name in adapter.linear_names if plan.name.endswith("." + name)}
        if len(by_name) != len(adapter.linear_names) or len(plans) != len(by_name):
            raise ValueError(f"a block has {len(adapter.linear_names)} linears, these plans are of {len(plans)}")
        block = adapter.own(original)
        reports: list[LinearReport] = []
        student = list(student)
        closing = closing_linears_of(block, student, adapter.group_heads)
        for group in adapter.linear_groups:
            group_plans = {name: by_name[name] for name in group}
            inputs = [reference.pop(group[0]) for reference in references] if self.follows_original else None
            if group[0] in closing:
                with materialized(block):
                    student = reach(block, student, group[0], closing[group[0]], keep)
            done = self._compress_group(
                block,
                group_plans,
                quantizer,
                inputs,
                student,
                finished or NothingFinished(),
                linear_done or (lambda *_: None),
                keep,
            )
            for name in group:
                layer, report = done[name]
                block.set_submodule(name, layer)
                reports.append(report)
        return block, reports, student

    def _compress_group(
        self,
        block: nn.Module,
        plans: Mapping[str, ModulePlan],
        quantizer: Quantizer,
        references: Sequence[Tensor] | None,
        student: Sequence[BlockBatch],
        finished: FinishedLinears,
        linear_done: Callable[[LinearReport, bool], None],
        keep: Keep,
    ) -> dict[str, tuple[Layer, LinearReport]]:
        """All linears of a group: found, or made and kept."""
        found = {name: done for name in plans if (done := finished.find(name)) is not None}
        for _, report in found.values():
            linear_done(report, True)
        missing = [name for name in plans if name not in found]
        if not missing:
            return found
        with materialized(block):  # all batches pass through what is compressed already
            moments = collect_moments(block, student, references, next(iter(plans)), self.token_limit, keep)
        second, aim = moments.second, self.aim(moments)
        del moments  # the cross moment of a wide linear is half as large as a block
        costs = {name: float(plan.shape[0] * plan.shape[1]) for name, plan in plans.items()}
        together = are_uneven(costs)
        own = missing if together else own_share({name: costs[name] for name in missing})
        targets = {name: _target(aim, _dense_linear(block, name).weight, together) for name in own}
        del aim
        made = {}
        for name in own:
            linear = _dense_linear(block, name)
            made[name] = self.compress_linear(linear, targets[name], plans[name], quantizer, second, together)
            if together or process_count() == 1:
                finished.add(name, *made[name])
                linear_done(made[name][1], False)
        if together:
            return found | made
        everyones = of_everyone(made, second.device)
        if process_count() > 1:  # only the first process writes, and it learns of the others' linears just now
            for name in missing:
                finished.add(name, *everyones[name])
                linear_done(everyones[name][1], False)
        return found | everyones

    def aim(self, moments: Moments) -> PropagationTarget | None:
        """What makes targets of the weights that read one input; None if these are the targets."""
        if moments.cross is None:
            return None
        return PropagationTarget(moments.cross, moments.second, self.propagation)

    def compress_linear(
        self,
        linear: nn.Linear,
        target: Tensor,
        plan: ModulePlan,
        quantizer: Quantizer,
        moment: Tensor,
        together: bool = False,
    ) -> tuple[QuantizedLinear | LowRankLinear, LinearReport]:
        """What becomes of one linear.

        Args:
            linear: as it is in the original.
            target: what to aim at (O, I).
            plan: its rank and bits.
            quantizer: does the rounding.
            moment: second moment (I, I) of what it reads.
            together: see `Quantizer.quantize`.

        Raises:
            NumericsError: as `Quantizer.quantize`; the message begins with the name.
        """
        start = time.perf_counter()
        if moment.nbytes > _LARGE:
            trim_heap()
        # a name, not a position, seeds the linear: hash() differs between processes, a sum of bytes does not
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + sum(map(ord, plan.name)) + 7919 * plan.block)
        settings: dict[str, Any] = {
            "bits": plan.bits, "bias": linear.bias, "generator": generator, "together": together,
        }  # fmt: skip
        quantizer = quantizer.for_module(plan.name)
        layer: QuantizedLinear | LowRankLinear
        try:
            if plan.rank is None:
                layer = quantizer.quantize(target, moment, **settings)
            else:
                layer = quantize_low_rank(target, moment, plan.rank, quantizer, **settings)
            layer.round_to_storage()  # what comes after it in the block sees it as it will be
        except NumericsError as error:
            raise NumericsError(f"{plan.name}: {error}") from error
        loss = relative_proxy_loss(linear.weight, layer.dequantize().detach(), moment)
        seconds = time.perf_counter() - start
        dead = int((moment.diagonal() == 0).sum())
        return layer, LinearReport(plan.name, loss, layer.bits_per_weight_codes, layer.bits_per_weight, seconds, dead)


def _target(aim: PropagationTarget | None, weight: Tensor, together: bool) -> Tensor:
    """What a linear with this weight (O, I) aims at."""
    if aim is None:
        return weight.detach().float()
    share = RowShare.of_products(len(weight), together)
    return share.join(aim.of(weight[share.own].float()))


@torch.no_grad()
def collect_moments(
    block: nn.Module,
    student: Sequence[BlockBatch],
    references: Sequence[Tensor] | None,
    name: str,
    token_limit: float | None = None,
    keep: Keep = in_memory,
) -> Moments:
    """Moments of the linear `name`, mean over the real tokens of all processes.

    Args:
        block: the block as far as it is compressed.
        student: its inputs behind the compressed prefix.
        references: per batch what the linear reads in the original, (N, I); None for no cross moment.
        name: the linear, relative to the block.
        token_limit: see `BlockQuantization`; what is typical is seen in `references`, and kept to by both inputs.
            Without references it is seen in what the linear reads now.
        keep: keeps that in the latter case.
    """
    linear = _dense_linear(block, name)
    width, device = linear.in_features, linear.weight.device
    seen = (linear_inputs(block, batch, [name])[name] for batch in student)
    if references is None:
        return _second_moment([keep(inputs) for inputs in seen], width, device, token_limit)
    limit = energy_limit(references, token_limit, device)
    second, cross = GramSum(width, device), ProductSum(width, width, device)
    tokens = 0
    for inputs, reference in zip(seen, references, strict=True):
        inputs = inputs.float()
        reference = reference.to(inputs)
        roots = root_weights(limit, inputs, reference).to(inputs)
        with full_width_products():
            second.add(inputs.mul_(roots))
            cross.add(reference, inputs.mul_(roots))  # the whole weight is on one side now: no copy of the other
        tokens += len(inputs)
    mean = _mean_over(tokens, device)
    return Moments(second.narrow(mean), cross.narrow(mean))


def _second_moment(seen: Sequence[Tensor], width: int, device: torch.device, token_limit: float | None) -> Moments:
    """Of what a linear reads (N, I) batch by batch, where nothing else is asked."""
    limit = energy_limit(seen, token_limit, device)
    second = GramSum(width, device)
    for inputs in seen:
        inputs = inputs.to(device, torch.float32, copy=True)
        roots = root_weights(limit, inputs).to(inputs)
        with full_width_products():
            second.add(inputs.mul_(roots))
    return Moments(second.narrow(_mean_over(sum(map(len, seen)), device)), None)


def _mean_over(tokens: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Makes a sum over this process's tokens the mean over those of all."""
    count = sum_of_all(torch.tensor(tokens, device=device))
    return lambda total: sum_of_all(total).div_(count)


@torch.no_grad()
def round_to_nearest(adapter: ModelAdapter, quantizer: Quantizer, bits: int) -> Iterator[nn.Module]:
    """Compressed copies of all blocks, one after the other, without any calibration: the baseline of every report."""
    for number, original in enumerate(adapter.originals()):
        block = adapter.own(original)
        for name in adapter.linear_names:
            linear = _dense_linear(block, name)
            identity, own = torch.eye(linear.in_features), quantizer.for_module(adapter.full_name(number, name))
            block.set_submodule(name, own.quantize(linear.weight, identity, bits=bits, bias=linear.bias))
        yield block


def _dense_linear(block: nn.Module, name: str) -> nn.Linear:
    linear = block.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{name} is a {type(linear).__name__}, not a dense linear that could be compressed")
    return linear
