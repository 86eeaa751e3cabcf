"""Why a linear got its rank and its bits: its score, its spectrum, and what other choices would have done."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from casp_pl.allocation import (
    BitChoices,
    CompressionPlan,
    LevelChange,
    ModulePlan,
    choices_of_plan,
    module_bits,
    predicted_error,
    reallocated,
    steps_from,
    uniform_rank,
)
from casp_pl.callbacks import BitAllocation, LowRankAllocation
from casp_pl.callbacks.stage_table import size
from casp_pl.checkpoint import RunDirectory
from casp_pl.errors import ConfigError, InputError
from casp_pl.modules import CalibrationStatistics
from casp_pl.quantizers import Quantizer

__all__ = ["ExplainSettings", "explanation", "find_module"]

_MOST_TRADES = 4  # groups that a sentence names


@dataclass(frozen=True)
class ExplainSettings:
    """A run that has calibrated, and what its recipe says of ranks and bits."""

    run_dir: Path
    quantizer: Quantizer
    low_rank: LowRankAllocation
    bits: BitAllocation


def explanation(settings: ExplainSettings, module: str) -> list[str]:
    """Lines of text.

    Args:
        settings: the run and its recipe.
        module: full name of a linear, or an end of it that only one linear has.

    Raises:
        InputError: the run has no plan yet.
        ConfigError: no linear, or several, have that name.
    """
    run = RunDirectory.read_only(settings.run_dir)
    if not (run.has("plan.json") and run.has("calibration.safetensors")):
        raise InputError(f"{settings.run_dir} has no plan yet: `fit` makes one in its calibration.")
    plan = CompressionPlan.from_json(run.read_json("plan.json"))
    statistics = CalibrationStatistics.from_tensors(run.read_tensors("calibration.safetensors")[0])
    settings.bits.attach(settings.quantizer, settings.low_rank)
    entry = find_module(plan, module)
    choices, levels = choices_of_plan(plan, settings.quantizer, settings.bits.granularity)
    method = f"{entry.quantizer}{_groups(settings.quantizer, entry)}"
    lines = [f"{entry.name}  {_by(entry.shape)}, block {entry.block}, {method}", f"  {entry.why}"]
    lines += _score(plan, entry, settings.bits.score)
    if entry.name in statistics.spectra:
        lines += _spectrum(settings, entry, statistics.spectra[entry.name])
    if entry.rank is None and not entry.pinned:
        lines += _bits(plan, entry, choices, levels)
    else:
        given = "bits.overrides gives it" if entry.pinned else "all low-rank factors have bits.factor_bits"
        lines += [f"bits: {given} ({entry.bits}); the allocation does not choose them."]
        lines += _bits_of_block(entry, choices, levels)
    return lines + _measured(run, entry)


def find_module(plan: CompressionPlan, name: str) -> ModulePlan:
    """The linear that is called so, or whose name ends so.

    Raises:
        ConfigError: there is none (the message has the closest name), or there are several.
    """
    names = [module.name for module in plan.modules]
    found = [full for full in names if full == name or full.endswith(f".{name}")]
    if len(found) == 1:
        return plan.module(found[0])
    if found:
        raise ConfigError(f"{len(found)} linears are called {name}: say which, for example {found[0]}.")
    ends = {".".join(full.split(".")[-depth:]): full for full in names for depth in range(1, full.count(".") + 2)}
    close = difflib.get_close_matches(name, ends, n=1, cutoff=0.3)
    raise ConfigError(
        f"No linear of the plan is called '{name}'.\nDid you mean '{ends[close[0]] if close else names[0]}'?"
    )


def _groups(quantizer: Quantizer, entry: ModulePlan) -> str:
    """The group size of its codes, where they have groups."""
    rows, columns = entry.shape
    spec = quantizer.for_module(entry.name).layer_spec(entry.rank or rows, columns, bits=entry.bits)
    return f" in groups of {spec['group_size']}" if "group_size" in spec else ""


def _score(plan: CompressionPlan, entry: ModulePlan, kind: str) -> list[str]:
    by_block = {block: sum(module.score for module in plan.of_block(block)) for block in plan.blocks}
    order = sorted(by_block, key=lambda block: -by_block[block])
    place = order.index(entry.block) + 1
    median = sorted(by_block.values())[len(by_block) // 2]
    first = "" if place == 1 else f", block {order[0]} has {by_block[order[0]]:.4g}"
    return [
        f"score ({kind}): block {entry.block} has {by_block[entry.block]:.4g}, place {place} of {len(order)}"
        f" (median {median:.4g}{first}); {entry.score:.4g} of it are this linear's."
    ]


def _spectrum(settings: ExplainSettings, entry: ModulePlan, spectrum: Tensor) -> list[str]:
    """The error that low rank alone leaves, at the chosen rank and around it."""
    energy = spectrum.double().square()
    tails = (1 - energy.cumsum(0) / energy.sum()).clamp_min(0).tolist()
    grain, full = settings.low_rank.grain, min(entry.shape)
    lines = ["spectrum of the whitened weight: error that low rank alone leaves, tr(E H E^T) / tr(W H W^T)"]
    wanted = {max(grain, full // part // grain * grain) for part in (16, 8, 4, 2)} | {full}
    if entry.rank is not None:
        wanted |= {rank for rank in (entry.rank - grain, entry.rank, entry.rank + grain) if 1 <= rank <= full}
    factor_bits = entry.bits if entry.rank is not None else settings.bits.factor_bits
    for rank in sorted(wanted):
        cost = module_bits(settings.quantizer.for_module(entry.name), entry.shape, bits=factor_bits, rank=rank).total
        mark = "  <- chosen" if rank == entry.rank else ""
        lines.append(
            f"  rank {rank:5d}  error {tails[rank - 1]:.2e}  {size(-(-cost // 8)):>9} at {factor_bits} bits{mark}"
        )
    if settings.low_rank.mode in ("spectral", "uniform"):
        equal = uniform_rank(entry.shape, settings.low_rank.keep_ratio, grain)
        here = "stays one matrix" if entry.rank is None else f"has rank {entry.rank}"
        lines.append(
            f"  low_rank.mode {settings.low_rank.mode}, keep_ratio {settings.low_rank.keep_ratio:g}: equal ranks"
            f" would be {equal} (error {tails[equal - 1]:.2e}); it {here}."
        )
    return lines


def _bits(plan: CompressionPlan, entry: ModulePlan, choices: BitChoices, levels: Sequence[int]) -> list[str]:
    number = next(n for n, group in enumerate(choices.groups) if entry.name in {module.name for module in group})
    item, level = choices.items[number], levels[number]
    error = predicted_error(choices.items, levels)
    subject = _group_name(choices, number)
    share = 100 * item.score * item.choices[level][1] / error
    lines = [
        f"bits: {subject} has {level}, {size(item.choices[level][0] // 8)} of {plan.counts},"
        f" {share:.1f} % of the predicted error"
    ]
    for direction, change in zip(("less", "more"), steps_from(item, level), strict=True):
        lines.append(f"  one level {direction}: {_change(change, error)}")
        if change is not None:
            lines.append(f"    {_trade(plan, choices, levels, number, change.level)}")
    return lines


def _bits_of_block(entry: ModulePlan, choices: BitChoices, levels: Sequence[int]) -> list[str]:
    rest = {
        f"{group[0].name.rsplit('.', 1)[-1]} {level}" if len(group) == 1 else f"all of them {level}"
        for group, level in zip(choices.groups, levels, strict=True)
        if group[0].block == entry.block
    }
    return [f"  bits of the other linears of its block: {', '.join(sorted(rest))}."] if rest else []


def _change(change: LevelChange | None, error: float) -> str:
    if change is None:
        return "the quantizer has none"
    sign = "-" if change.cost < 0 else "+"
    amount = size(abs(change.cost) // 8)
    return f"{change.level} bits, {sign}{amount}, predicted error of the model {100 * change.error / error:+.2f} %"


def _trade(plan: CompressionPlan, choices: BitChoices, levels: Sequence[int], number: int, level: int) -> str:
    """What the best allocation within the same budget would be if this group had that level."""
    best = reallocated(choices.items, choices.budget_bits(plan.budget), number, level)
    if best is None:
        return "within the same budget nothing could pay for it."
    moved = [n for n, (old, new) in enumerate(zip(levels, best.levels, strict=True)) if old != new and n != number]
    names = [f"{_group_name(choices, n)} {levels[n]} -> {best.levels[n]}" for n in moved[:_MOST_TRADES]]
    more = f" and {len(moved) - _MOST_TRADES} more" if len(moved) > _MOST_TRADES else ""
    difference = 100 * (best.error / predicted_error(choices.items, levels) - 1)
    paid = f"with {', '.join(names)}{more}" if names else "with nothing else changed"
    return f"best within the same budget: {paid}; predicted error of the model {difference:+.2f} %."


def _measured(run: RunDirectory, entry: ModulePlan) -> list[str]:
    """Figures of the finished linear; a report from before its quantization has none, or none of any linear."""
    modules = run.read_json("report.json")["modules"] if run.has("report.json") else []
    figures = next((item for item in modules if item["name"] == entry.name), None)
    if figures is None or figures["relative_proxy_loss"] is None:
        return ["measured after quantization: not yet; `fit` goes on from here and measures it."]
    return [
        f"measured after quantization: relative proxy loss {figures['relative_proxy_loss']:.2e},"
        f" {figures['bits_total']:.3f} bits a weight, everything counted."
    ]


def _group_name(choices: BitChoices, number: int) -> str:
    group = choices.groups[number]
    return f"block {group[0].block}" if len(group) > 1 else group[0].name


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
