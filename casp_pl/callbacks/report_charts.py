"""Which charts a report has, and what they show."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from casp_pl.callbacks.charts import Bars, Chart, Heat, Lines, Picture, Point, Series
from casp_pl.callbacks.report import STAGE_NAMES, BlockFigures, CompressionReport, ModuleFigures, StageRow
from casp_pl.callbacks.run_details import RunDetails
from casp_pl.callbacks.stage_table import stage_title

__all__ = ["TEXTS", "report_pictures"]

_MOST_POINTS = 120  # of a line: a chart is hardly wider in pixels
_MANY_SECONDS = 300  # from here on in minutes
_LEAST = 1e-4  # of the largest singular value: what is smaller still is noise
_KINDS = ("text", "image")

# name of a picture -> its heading, and how to read it
TEXTS = {
    "stages": (
        "The stages",
        "What each stage left of the original. Answers are better the more are right; perplexity and KL are better the "
        "lower.",
    ),
    "bits": (
        "Bits and ranks",
        "Each linear layer has its own bits; the query and key projections are products of two matrices of a lower "
        "rank. The score says how much an error in a block counts: where it is high, bits are spent.",
    ),
    "proxy_loss": (
        "Error of every linear",
        "Error of a layer's output on the inputs that it really gets, relative to that output, right after "
        "quantization.",
    ),
    "attention_sparsity": (
        "Attention sparsity",
        "Share of the original's attention probabilities that are practically zero, by what looks (text or image "
        "tokens) and at what. The sparser, the less a low-rank query and key projection can harm.",
    ),
    "head_sparsity": (
        "Attention sparsity by head",
        "The same for every attention head.",
    ),
    "spectra": (
        "Spectra of the query and key projections",
        "Singular values of the weights, whitened by the inputs that they see, relative to the largest. What lies "
        "right of the chosen rank is cut off.",
    ),
    "losses": (
        "Fine-tuning",
        "Losses of block tuning (error of the tuned blocks' output, relative to it) and of end-to-end fine-tuning "
        "(KL from the original).",
    ),
    "timings": (
        "Time",
        "Wall time of every stage with its evaluation.",
    ),
}


def report_pictures(report: CompressionReport, details: RunDetails) -> list[Picture]:
    """Every picture that there are figures for, in the order in which they are shown."""
    charts: dict[str, Sequence[Chart | None]] = {
        "stages": _stage_bars(report.stages),
        "bits": [_bits(report.modules), _ranks(report.modules), _scores(report.blocks)],
        "proxy_loss": [_proxy_loss(report.modules)],
        "attention_sparsity": [_sparsity(report.blocks)],
        "head_sparsity": _head_sparsity(details.head_sparsity),
        "spectra": _spectra(details.spectra, report.modules),
        "losses": _losses(details.losses),
        "timings": [_timings(report)],
    }
    pictures = []
    for name, (title, text) in TEXTS.items():
        shown = [chart for chart in charts[name] if chart is not None]
        if shown:
            pictures.append(Picture(name=name, title=title, text=text, charts=shown))
    return pictures


def _stage_bars(stages: Sequence[StageRow]) -> list[Chart | None]:
    changed = [row for row in stages if row.name != "original"]  # whose KL from itself is 0
    percent = [(_percent(row.vqa_accuracy), row.vqa_interval) for row in stages]
    intervals = tuple(None if ends is None else (100 * ends[0], 100 * ends[1]) for _, ends in percent)
    return [
        _bars("answers right, % (95 % interval)", stages, [value for value, _ in percent], "{:.1f}", intervals),
        _bars("perplexity of held-out text", stages, [row.perplexity for row in stages], "{:,.2f}"),
        _bars("KL from the original on held-out text, nats", changed, [row.kl for row in changed], "{:.4f}"),
    ]


def _bars(
    title: str,
    stages: Sequence[StageRow],
    values: Sequence[float | None],
    form: str,
    intervals: tuple[tuple[float, float] | None, ...] = (),
) -> Bars | None:
    if all(value is None for value in values):
        return None
    names = tuple(stage_title(row.name) for row in stages)
    return Bars(title=title, names=names, values=tuple(values), intervals=intervals, form=form)


def _bits(modules: Sequence[ModuleFigures]) -> Heat | None:
    return _by_block("bits of the codes", modules, lambda module: module.bits, form="{:g}")


def _proxy_loss(modules: Sequence[ModuleFigures]) -> Heat | None:
    title = "relative error (proxy loss)"
    return _by_block(title, modules, lambda module: module.relative_proxy_loss or None, log=True)


def _by_block(
    title: str, modules: Sequence[ModuleFigures], pick: Callable[[ModuleFigures], float | None], **how: Any
) -> Heat | None:
    """Linear x block; None where no value is known."""
    rows, columns = (
        tuple(dict.fromkeys(module.linear for module in modules)),
        tuple(sorted({module.block for module in modules})),
    )
    table = {(module.linear, module.block): pick(module) for module in modules}
    values = tuple(tuple(table.get((row, column)) for column in columns) for row in rows)
    heat = Heat(title=title, rows=rows, columns=columns, values=values, **how)
    return heat if heat.known else None


def _ranks(modules: Sequence[ModuleFigures]) -> Lines | None:
    """A linear that is a product in some blocks only has its full rank in the others."""
    products = dict.fromkeys(module.linear for module in modules if module.rank is not None)
    ranks: dict[str, list[Point]] = {name: [] for name in products}
    for module in modules:
        if module.linear in ranks:
            ranks[module.linear].append((module.block, module.rank or min(module.shape)))
    return _lines("rank of the product (full: no product)", ranks)


def _scores(blocks: Sequence[BlockFigures]) -> Lines | None:
    return _lines("score of the block", {"score": [(b.block, b.score) for b in blocks if b.score is not None]})


def _sparsity(blocks: Sequence[BlockFigures]) -> Lines | None:
    kinds = dict.fromkeys(kind for block in blocks for kind in block.attention_sparsity)
    shares = {
        kind: [(b.block, 100 * share) for b in blocks if (share := b.attention_sparsity.get(kind)) is not None]
        for kind in kinds
    }
    return _lines("attention probabilities below the threshold, %", shares)


def _lines(title: str, points: Mapping[str, Sequence[Point]]) -> Lines | None:
    series = tuple(Series(name=name, points=tuple(line)) for name, line in points.items() if line)
    return Lines(title=title, x="block", series=series) if series else None


def _head_sparsity(shares: Tensor | None) -> list[Chart | None]:
    """One table of heads x blocks for each pair of modalities that occurred; shares (L, heads, 2, 2)."""
    if shares is None:
        return []
    heads, blocks = (tuple(range(count)) for count in (shares.shape[1], shares.shape[0]))
    charts: list[Chart | None] = []
    for q, query in enumerate(_KINDS):
        for k, key in enumerate(_KINDS):
            table = (100 * shares[:, :, q, k].T).tolist()
            values = tuple(tuple(None if math.isnan(share) else share for share in row) for row in table)
            rows, title = tuple(f"head {head}" for head in heads), f"{query} to {key}, % below the threshold"
            heat = Heat(title=title, rows=rows, columns=blocks, values=values, form="{:.1f}", bounds=(0.0, 100.0))
            charts.append(heat if heat.known else None)
    return charts


def _spectra(spectra: Mapping[str, Tensor], modules: Sequence[ModuleFigures]) -> list[Chart | None]:
    """One chart for each kind of linear, a line a block."""
    lines: dict[str, list[Series]] = {}
    for module in modules:
        values = spectra.get(module.name)
        if values is not None and float(values[0]) > 0:
            relative = (values / values[0]).tolist()
            points = [(float(number), share) for number, share in enumerate(relative, start=1) if share > _LEAST]
            marks = tuple(point for point in points if point[0] == module.rank)
            shown = Series(name=f"block {module.block}", points=tuple(_thinned(points)), marks=marks)
            lines.setdefault(module.linear, []).append(shown)
    return [
        Lines(title=f"{linear}: singular values", x="number of the singular value", series=tuple(series), log=True,
              ordered=True, marks="chosen rank" if any(line.marks for line in series) else "")
        for linear, series in lines.items()
    ]  # fmt: skip


def _losses(losses: Mapping[str, Sequence[tuple[int, float]]]) -> list[Chart | None]:
    windows = sorted(tag.rsplit("_", 1)[1] for tag in losses if tag.startswith("block_tuning/train_"))
    charts: list[Chart | None] = []
    for kind, title in (("train", "block tuning: training error"), ("held_back", "block tuning: held-back error")):
        tags = {number: f"block_tuning/{kind}_{number}" for number in windows}
        series = [_loss(f"up to block {int(number)}", losses[tag]) for number, tag in tags.items() if losses.get(tag)]
        charts.append(Lines(title=title, x="step", series=tuple(series), ordered=True) if series else None)
    names = {"train_kl": "training", "held_back_kl": "held-back text", "held_back_answer_kl": "held-back answers"}
    series = [_loss(name, losses[f"end_to_end/{tag}"]) for tag, name in names.items() if f"end_to_end/{tag}" in losses]
    charts.append(Lines(title="end to end: KL, nats", x="step", series=tuple(series)) if series else None)
    return charts


def _loss(name: str, curve: Sequence[tuple[int, float]]) -> Series:
    points = [(float(step), value) for step, value in curve if math.isfinite(value)]
    return Series(name=name, points=tuple(_averaged(points)))


def _timings(report: CompressionReport) -> Bars | None:
    seconds = {stage_title(row.name): row.seconds for row in report.stages if row.seconds is not None}
    if "calibration" in report.work_seconds:  # which no stage counts
        before = [stage_title(name) for name in STAGE_NAMES[:2]]
        first = {name: spent for name, spent in seconds.items() if name in before}
        seconds = first | {"calibration": report.work_seconds["calibration"]} | seconds
    if not seconds:
        return None
    if report.wall_seconds is not None:
        seconds["all the rest"] = max(0.0, report.wall_seconds - sum(seconds.values()))
    unit, title = (60.0, "minutes") if sum(seconds.values()) > _MANY_SECONDS else (1.0, "seconds")
    values = tuple(spent / unit for spent in seconds.values())
    return Bars(title=title, names=tuple(seconds), values=values, form="{:,.1f}", fair=True)


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Every so many points, the last one included."""
    step = -(-len(points) // _MOST_POINTS)
    return [*points[:-1:step], points[-1]] if points else []


def _averaged(points: Sequence[Point]) -> list[Point]:
    """Means of so many neighbours."""
    step = max(1, -(-len(points) // _MOST_POINTS))
    groups = [points[start : start + step] for start in range(0, len(points), step)]
    return [(group[0][0], sum(value for _, value in group) / len(group)) for group in groups]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
