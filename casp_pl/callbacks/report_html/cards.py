"""The summary on top of the page: the few figures that one asks for first."""

from typing import NamedTuple

from casp_pl.callbacks.report import CompressionReport, StageRow
from casp_pl.callbacks.stage_table import duration, number, size, stage_title

__all__ = ["Card", "summary_cards"]

_COMPRESSED = ("end_to_end", "block_tuned", "quantized")


class Card(NamedTuple):
    """One figure with its name and what it is compared with."""

    label: str
    value: str
    more: list[str]


def summary_cards(report: CompressionReport) -> list[Card]:
    """Size, bits, accuracy, KL, perplexity and cost of the compressed model as it stands, beside the original's."""
    original = report.stage("original") or StageRow(name="original")
    found = (report.stage(name) for name in _COMPRESSED)
    final = next((row for row in found if row is not None), StageRow(name="quantized"))
    return [
        _size(original, final),
        Card(
            "Bits a weight",
            number(final.bits_per_weight_total, 2),
            [f"{number(final.bits_per_weight_codes, 2)} in codes alone", "of the compressed linears; 16 before"],
        ),
        Card("Answers right", _accuracy(final), [f"95 %: {_interval(final)}", f"original {_accuracy(original)}"]),
        Card("KL", number(final.kl, 4), ["nats from the original, held-out text", *_rounded(report.stage("rtn"))]),
        Card("Perplexity", number(final.perplexity, 2), [f"original {number(original.perplexity, 2)}"]),
        Card("Cost", duration(report.wall_seconds), [f"peak memory {size(report.peak_memory_bytes)}"]),
    ]


def _size(original: StageRow, final: StageRow) -> Card:
    before = f"original {size(original.model_bytes)}"
    if original.model_bytes and final.model_bytes:
        before += f": {original.model_bytes / final.model_bytes:.1f} times smaller"
    return Card("Size", size(final.model_bytes), [before])


def _rounded(rtn: StageRow | None) -> list[str]:
    return [] if rtn is None or rtn.kl is None else [f"{stage_title('rtn')}: {number(rtn.kl, 4)}"]


def _accuracy(row: StageRow) -> str:
    return "n/a" if row.vqa_accuracy is None else f"{100 * row.vqa_accuracy:.1f} %"


def _interval(row: StageRow) -> str:
    return "n/a" if row.vqa_interval is None else " - ".join(number(edge, 1, 100) for edge in row.vqa_interval)
