"""Original and compressed model on the same samples: one value, shown on the console, in Markdown and in JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from casp_pl.callbacks.report import StageRow, finite
from casp_pl.callbacks.report_markdown import markdown_table
from casp_pl.callbacks.stage_table import number, size
from casp_pl.console import print_table, print_text
from casp_pl.evaluation import DecodeCost, PairedFigures

__all__ = ["ModelComparison", "comparison_markdown", "print_comparison"]

_HEADER = ("", "original", "compressed")
_READING = """\
- **difference** is compressed minus original on the same questions, with a bootstrap interval that draws images: it is
  paired, so what makes a question hard cancels out. Where it holds 0, these questions do not tell the models apart.
- **only original right**, **only compressed right**: the questions on which McNemar's exact test rests. It takes
  questions as independent, which those about one image are not; the interval does not.
- **flips** are answers that differ from the original's as normalised text, right or wrong. **KL** is that of the next
  token on held-out text, in nats, **KL, answers** that of the first token of an answer.
- behind accuracy, flips, perplexity and KL stand their own 95 % intervals, by a bootstrap over images (of questions) or
  windows (of text). The two perplexities are of the same windows: that their intervals overlap says little.
- **size** is the whole model as stored; **weights in memory** as it lies there while it runs (float32 on a CPU).
- **decode** is greedy, one sequence, one token at a time after a short prompt, compressed layers by look-up. **peak
  memory** is the largest resident size of the process meanwhile, libraries included (on a GPU the largest allocation).
- n/a: not measured, not finite, or does not apply."""


@dataclass(frozen=True, kw_only=True)
class ModelComparison:
    """What `test` and `validate` report.

    Attributes:
        data: name of the source of the questions.
        rule: name of the rule that scores them.
        original: figures of the original.
        compressed: figures of the compressed model.
        paired: both question by question; None without questions.
        rule_original: what else the rule reports of the original's answers.
        rule_compressed: the same of the compressed model's.
        decode_original: speed and memory of the original.
        decode_compressed: the same of the compressed model.
    """

    data: str
    rule: str
    original: StageRow
    compressed: StageRow
    paired: PairedFigures | None
    rule_original: dict[str, float] = field(default_factory=dict)
    rule_compressed: dict[str, float] = field(default_factory=dict)
    decode_original: DecodeCost | None = None
    decode_compressed: DecodeCost | None = None

    def to_json(self) -> dict[str, Any]:
        """A value for test.json: `models` holds one object a model, `paired` the comparison; not measured is null."""
        models = {
            name: asdict(row) | {"rule_figures": figures, "decoding": None if decoding is None else asdict(decoding)}
            for name, row, figures, decoding in (
                ("original", self.original, self.rule_original, self.decode_original),
                ("compressed", self.compressed, self.rule_compressed, self.decode_compressed),
            )
        }
        paired = None if self.paired is None else self.paired.to_dict()
        value = {"data": self.data, "rule": self.rule, "models": models, "paired": paired}
        return {key: finite(part, key) for key, part in value.items()}


def print_comparison(comparison: ModelComparison, console: Console) -> None:
    """Both models in two columns, then the paired figures."""
    print_table(_HEADER, _rows(comparison), console, title=_title(comparison))
    for name, value in _paired_rows(comparison.paired):
        print_text(f"{name}: {value}", console)


def comparison_markdown(comparison: ModelComparison) -> str:
    """The text of test.md."""
    paired = _paired_rows(comparison.paired)
    parts = [
        f"# {_title(comparison)}",
        markdown_table(_HEADER, _rows(comparison)),
        *(["## Question by question", markdown_table(("", ""), paired)] if paired else []),
        "## How to read it\n\n" + _READING,
    ]
    return "\n\n".join(parts) + "\n"


def _title(comparison: ModelComparison) -> str:
    row = comparison.compressed
    parts = [f"{row.questions:,} questions of {comparison.data} by {comparison.rule}"] if row.questions else []
    parts += [f"{row.text_tokens:,} tokens of text"] if row.text_tokens else []
    return "Original and compressed on " + " and ".join(parts)


def _rows(comparison: ModelComparison) -> list[list[str]]:
    rows = [
        ["bits codes/total", *(_bits(row) for row in (comparison.original, comparison.compressed))],
    ]
    for title, name, ends, digits, factor in _FIGURES:
        both = (comparison.original, comparison.compressed)
        shown = (number(getattr(row, name), digits, factor) + _range(row, ends, digits, factor) for row in both)
        rows.append([title, *shown])
    for name, value in comparison.rule_original.items():
        factor = 1.0 if name.startswith("score") else 100.0
        title = name if factor == 1.0 else f"{name} %"
        rows.append([title, number(value, 1, factor), number(comparison.rule_compressed.get(name), 1, factor)])
    rows.append(["size", size(comparison.original.model_bytes), size(comparison.compressed.model_bytes)])
    costs = (comparison.decode_original, comparison.decode_compressed)
    rows.append(["decode tokens/s", *("n/a" if cost is None else f"{cost.tokens_per_second:.1f}" for cost in costs)])
    rows.append(["weights in memory", *(size(None if cost is None else cost.weights_bytes) for cost in costs)])
    rows.append(["peak memory", *(size(None if cost is None else cost.peak_memory_bytes) for cost in costs)])
    return rows


_FIGURES: tuple[tuple[str, str, str | None, int, float], ...] = (  # title, figure, its interval, digits, factor
    ("accuracy %", "vqa_accuracy", "vqa_interval", 1, 100.0),
    ("not yes/no %", "vqa_accuracy_not_yes_no", None, 1, 100.0),
    ("flips %", "flip_rate", "flip_interval", 1, 100.0),
    ("perplexity", "perplexity", "perplexity_interval", 2, 1.0),
    ("KL", "kl", "kl_interval", 4, 1.0),
    ("KL, answers", "kl_answers", "kl_answers_interval", 4, 1.0),
)


def _bits(row: StageRow) -> str:
    return f"{number(row.bits_per_weight_codes, 3)} / {number(row.bits_per_weight_total, 3)}"


def _range(row: StageRow | PairedFigures, name: str | None, digits: int, factor: float) -> str:
    ends = None if name is None else getattr(row, name)
    return "" if ends is None else f" ({number(ends[0], digits, factor)} to {number(ends[1], digits, factor)})"


def _paired_rows(paired: PairedFigures | None) -> list[list[str]]:
    if paired is None:
        return []
    p = "n/a (the rule gives parts of a score)" if paired.mcnemar_p is None else f"{paired.mcnemar_p:.3g}"
    return [
        ["difference, points (95 %)", f"{100 * paired.difference:+.2f}{_range(paired, 'interval', 1, 100)}"],
        ["only original right", f"{paired.only_original:,} of {paired.questions:,} on {paired.images:,} images"],
        ["only compressed right", f"{paired.only_compressed:,}"],
        ["McNemar's exact p", p],
    ]
