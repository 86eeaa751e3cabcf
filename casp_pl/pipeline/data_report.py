"""The command `data`: what enters a fit, told before anything is computed."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from rich.console import Console

from casp_pl.checkpoint.atomic import write_bytes
from casp_pl.console import make_console, print_path, print_table, print_text
from casp_pl.data import CalibrationData, Mixture
from casp_pl.data.contact_sheet import contact_sheet
from casp_pl.data.counts import count_samples
from casp_pl.data.images import ImageSource
from casp_pl.data.skipped import Skipped
from casp_pl.data.tokenize import Encoded, Processor, tokenizer_of
from casp_pl.pipeline.settings import RunSettings

__all__ = ["data"]

_MOST_IMAGES = 36
_MOST_SKIPPED = 10
_HEADER = ("part", "samples", "conversations", "images", "image tokens", "question tokens", "counted tokens")


def data(settings: RunSettings, *, out: Path | None = None) -> int:
    """Print which samples enter, their tokens, and what is skipped and why; draw some of the images with captions.

    The picture is written to `out`, by default beside the run's directory. No weights are loaded.
    """
    console = make_console()
    processor = settings.model.load_processor()
    settings.data.attach(processor)
    try:
        settings.data.setup()
    finally:  # where too much is skipped, what it is says more than the error
        _print_skipped(settings.data.skipped, console)
    print_text(_looked_at(settings.data), console)
    rows = [_row(name, samples) for name, samples in settings.data.parts.items()]
    print_table(_HEADER, rows, console)
    if isinstance(settings.data.source, Mixture):
        _print_shares(settings.data.source, list(chain(*settings.data.parts.values())), console)
    print_text(f"fingerprint: {settings.data.fingerprint}", console)
    entries = _entries(settings.data.parts["calibration"], processor)
    if entries:
        path = settings.run_dir.with_name(f"{settings.run_dir.name}.data.png") if out is None else out
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, contact_sheet(entries))
        print_path("images:", path, console)
    return 0


def _looked_at(data: CalibrationData) -> str:
    rows = f"conversations are chosen from {data.counts['rows']:,} rows"
    return f"{rows}: the source streams, and no more of it is read" if data.source and data.source.streams else rows


def _row(name: str, samples: Sequence[Encoded]) -> list[str]:
    counts = count_samples(samples)
    total = max(1, counts["image_tokens"] + counts["text_tokens"])
    tokens = (counts["image_tokens"], counts["text_tokens"] - counts["counted_tokens"], counts["counted_tokens"])
    cells = [f"{counts[key]:,}" for key in ("samples", "conversations", "images")]
    return [name, *cells, *(f"{count:,} ({count / total:.1%})" for count in tokens)]


def _print_shares(mixture: Mixture, samples: Sequence[Encoded], console: Console) -> None:
    """What each source of a mixture has given, beside its weight; an id begins with the number of its source."""
    rows = []
    own = [[sample for sample in samples if sample.id.startswith(f"{n}/")] for n in range(len(mixture.sources))]
    all_samples, all_tokens = sum(map(len, own)), sum(map(_tokens, own))
    for number, (source, weight) in enumerate(zip(mixture.sources, mixture.weights, strict=True)):
        count, tokens = len(own[number]), _tokens(own[number])
        shares = (f"{count:,} ({count / max(1, all_samples):.1%})", f"{tokens:,} ({tokens / max(1, all_tokens):.1%})")
        rows.append([f"{number} {type(source).__name__}", f"{weight:.1%}", *shares])
    print_table(("source of the mixture", "weight", "samples", "tokens"), rows, console)


def _tokens(samples: Sequence[Encoded]) -> int:
    return sum(map(len, samples))


def _print_skipped(skipped: Sequence[Skipped], console: Console) -> None:
    if not skipped:
        print_text("skipped: nothing", console)
        return
    rows = [[entry.id, entry.reason] for entry in skipped[:_MOST_SKIPPED]]
    print_table(("skipped", "reason"), rows, console)
    kinds = Counter(_kind(entry.reason) for entry in skipped)
    reasons = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    print_text(f"skipped: {len(skipped)} ({reasons})", console)


def _kind(reason: str) -> str:
    """A reason without the path in front of it and the details behind it."""
    found = re.search(r": ([^:()]+?)( \(.*)?$", reason)
    return found[1] if found else reason


def _entries(samples: Sequence[Encoded], processor: Processor) -> list[tuple[ImageSource, str]]:
    """Images spread evenly over the samples, each with its place in its sample and the text that goes with it."""
    every = [(sample, number) for sample in samples for number in range(len(sample.images))]
    step = max(1, len(every) // _MOST_IMAGES)
    tokenizer = tokenizer_of(processor)
    pictures = {getattr(processor, name, None) for name in ("image_token_id", "video_token_id")}
    entries = []
    for sample, number in every[::step][:_MOST_IMAGES]:
        ids = [token for token in sample.input_ids if token not in pictures]
        text = " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
        of = f" {number + 1}/{len(sample.images)}" if len(sample.images) > 1 else ""
        entries.append((sample.images[number], f"{sample.id}{of}: {text}"))
    return entries
