"""A forecast for people: what `plan` prints."""

from collections import Counter

from rich.console import Console

from casp_pl.callbacks.stage_table import duration, size
from casp_pl.console import print_table, print_text
from casp_pl.pipeline.bit_forecast import GroupForecast
from casp_pl.pipeline.forecast import RunForecast
from casp_pl.pipeline.stage_forecast import StageForecast

__all__ = ["print_forecast"]

_MOST_ROWS = 40  # more groups than that are linears one by one: only the dearest are shown


def print_forecast(forecast: RunForecast, console: Console) -> None:
    """Tables of stages, bits and sizes, and what to change where something does not fit."""
    _print_linears(forecast, console)
    _print_stages(forecast, console)
    if forecast.groups:
        _print_bits(forecast, console)
        _print_curve(forecast, console)
    else:
        print_text("No bits are left to choose: bits.overrides and low-rank products have them all.", console)


def _print_linears(forecast: RunForecast, console: Console) -> None:
    plan, stored = forecast.plan, forecast.size
    counts = Counter(
        (module.name.rsplit(".", 1)[-1], str(module.bits), "-" if module.rank is None else str(module.rank))
        for module in plan.modules
    )
    rows = [[linear, bits, rank, str(count)] for (linear, bits, rank), count in counts.items()]
    print_table(["linear", "bits", "rank", "blocks"], rows, console)
    exact = "exact" if forecast.size_is_exact else f"not exact: {forecast.size_note}"
    codes, total = plan.bits_per_weight_codes, plan.bits_per_weight_total
    for line in (
        f"bits per weight: {codes:.3f} codes, {total:.3f} everything counted; from {forecast.plan_from}",
        f"size: {_files(stored.files)} {stored.weights:,} bytes ({size(stored.weights)}), {exact}",
        f"      beside it {stored.beside:,} bytes of config and processor (without model card and manifest);"
        f" 16-bit original {size(forecast.original_bytes)}",
    ):
        print_text(line, console)


def _files(count: int) -> str:
    return "model.safetensors" if count == 1 else f"{count} safetensors files, one for each block and one for the rest,"


def _print_stages(forecast: RunForecast, console: Console) -> None:
    rows = [
        [
            stage.name,
            *_times(stage),
            size(stage.memory_bytes),
            size(stage.disk_bytes + stage.disk_passing_bytes),
            {True: "yes", False: "NO", None: "?"}[stage.fits],
        ]
        for stage in forecast.stages
    ]
    print_text("", console)
    print_table(["stage", "time", "interval", "memory", "disk", "fits"], rows, console)
    for line in _totals(forecast):
        print_text(line, console)
    for stage in forecast.stages:
        if stage.fits is False:
            print_text(f"{stage.name} does not fit. {stage.way_out}", console)


def _times(stage: StageForecast) -> tuple[str, str]:
    if stage.seconds is None or stage.seconds_low is None or stage.seconds_high is None:
        return "?", "?"
    return duration(stage.seconds), f"{duration(stage.seconds_low)} - {duration(stage.seconds_high)}"


def _totals(forecast: RunForecast) -> tuple[str, str]:
    memory, disk = size(forecast.memory_bytes), size(forecast.disk_bytes)
    if forecast.seconds is None or forecast.memory_free is None:
        return (
            "time: not known, trainer.accelerator asks for a GPU and there is none here; with"
            " --trainer.accelerator cpu the times are those of this machine",
            f"memory: a GPU with about {memory} free is needed (with less see model.streaming), disk: about {disk};"
            f" {size(forecast.disk_free)} are free",
        )
    return (
        f"time: about {duration(forecast.seconds)}, from {forecast.seconds_from}; loading is not counted",
        f"memory: about {memory}, disk: about {disk};"
        f" {size(forecast.memory_free)} and {size(forecast.disk_free)} are free",
    )


def _print_bits(forecast: RunForecast, console: Console) -> None:
    groups = sorted(forecast.groups, key=lambda group: -group.error_share)[:_MOST_ROWS]
    shown = [group for group in forecast.groups if group in groups]
    rows = [
        [group.name, str(group.bits), _ranks(group), f"{group.score:.3g}", f"{100 * group.error_share:.1f} %"]
        + [_change(group.one_bit_less), _change(group.one_bit_more)]
        for group in shown
    ]
    print_text("", console)
    header = ["bits of", "bits", "ranks", "score", "of the error", "one level less", "one level more"]
    print_table(header, rows, console)
    if forecast.plan_from == "prediction":
        print_text(
            "Which blocks get more bits is decided after calibration; here the first and last stand in.", console
        )


def _print_curve(forecast: RunForecast, console: Console) -> None:
    rows = [
        [size(point.weights_bytes), f"{point.bits_per_weight_total:.3f}", f"{100 * point.error:.1f} %"]
        for point in forecast.curve
    ]
    print_text("", console)
    print_table(["model.safetensors", "bits per weight", "predicted error, this plan 100 %"], rows, console)


def _ranks(group: GroupForecast) -> str:
    return "/".join(str(rank) for rank in group.ranks.values()) or "-"


def _change(price: dict[str, float] | None) -> str:
    if price is None:
        return "-"
    sign = "-" if price["bytes"] < 0 else "+"
    return f"{sign}{size(abs(round(price['bytes'])))}, error {100 * price['error']:+.1f} %"
