"""Calibration and fine-tuning samples: conversations with text windows mixed in, a share of them held back."""

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch

from casp_pl.data.collate import Collator
from casp_pl.data.contents import digest_of
from casp_pl.data.counts import count_samples
from casp_pl.data.loaders import FixedLoader, Share, StatefulLoader, deal, dealt_out, divided, in_batches
from casp_pl.data.sample import Sample
from casp_pl.data.selection import (
    choose_windows,
    encode_conversations,
    group_by_image,
    hold_back,
    join_overlapping,
    some_images,
    spread_over_images,
)
from casp_pl.data.skipped import Skipped, refuse_too_many_skipped
from casp_pl.data.sources import DataSource, EasyVQA, PydocProse
from casp_pl.data.stream import SampleStream, rows_to_choose_from
from casp_pl.data.tokenize import Counted, Encoded, Processor
from casp_pl.errors import ConfigError, InputError
from casp_pl.processes import is_first, rank_and_count

__all__ = ["CalibrationData"]

_LOG = logging.getLogger(__name__)
_PAD_TO_MULTIPLE_OF = 16
_Split: TypeAlias = tuple[list[Encoded], list[Encoded], list[Encoded]]
"""Kept, held back, and for fine-tuning alone."""


class CalibrationData(pl.LightningDataModule):
    """Samples that the compression learns from; the same settings and seed choose the same samples.

    Images are checked and everything is tokenized in `setup`; pixels are loaded batch by batch.

    Args:
        source: image-text (or text-only) conversations; easy-VQA if not given.
        text_source: plain texts; the prose of Python's language reference if not given.
        samples: number of samples in all, images with their conversations and text windows.
        text_ratio: share of the samples that are text windows: 0 for conversations alone, 1 for text alone.
        text_length: tokens of a text window.
        questions_per_image: conversations about one image that are taken together as one sample. They share the
            tokens up to the end of the image, so a sample of eight costs little more than twice one of one.
        holdout: share of the samples, by whole images, that is held back for validation.
        fine_tuning_samples: samples that `train_dataloader` draws from, those kept for calibration among them; more
            than these cost only what training on them costs. None for the same ones.
        batch_size: samples per batch, of all processes together: a run's result does not depend on their number.
        max_length: longer conversations are cut to that many tokens.
        rows: of each source only the first so many rows are read. None reads all, or of one that streams
            (`DataSource.streams`) the needed ones and 1,000 more to choose from.
        counted: whether fine-tuning learns from the answers of conversations only, or from all of their text.
        seed: decides which samples are taken and in which order training sees them.
    """

    def __init__(
        self,
        *,
        source: DataSource | None = None,
        text_source: DataSource | None = None,
        samples: int = 256,
        text_ratio: float = 0.25,
        text_length: int = 256,
        questions_per_image: int = 1,
        holdout: float = 0.125,
        fine_tuning_samples: int | None = None,
        batch_size: int = 8,
        max_length: int = 2048,
        rows: int | None = None,
        counted: Counted = "answers",
        seed: int = 0,
    ) -> None:
        super().__init__()
        least = {
            "samples": (samples, 1),
            "text_length": (text_length, 2),
            "questions_per_image": (questions_per_image, 1),
            "fine_tuning_samples": (samples if fine_tuning_samples is None else fine_tuning_samples, samples),
            "batch_size": (batch_size, 1),
            "rows": (1 if rows is None else rows, 1),
        }
        for name, (value, low) in least.items():
            if value < low:
                raise ConfigError(f"data.{name} is {value}, it must be at least {low}")
        if not (0 <= text_ratio <= 1 and 0 <= holdout < 1):
            raise ConfigError(f"data.text_ratio ({text_ratio}) and data.holdout ({holdout}) are shares between 0 and 1")
        self.source = source
        self.text_source = text_source
        self.samples = samples
        self.fine_tuning_samples = samples if fine_tuning_samples is None else fine_tuning_samples
        self.text_ratio = text_ratio
        self.questions_per_image = questions_per_image
        self.text_length = text_length
        self.holdout = holdout
        self.batch_size = batch_size
        self.max_length = max_length
        self.rows = rows
        self.counted: Counted = counted
        self.seed = seed
        self._processor: Processor = None
        self._kept: list[Encoded] = []
        self._held_back: list[Encoded] = []
        self._more: list[Encoded] = []
        self._skipped: list[Skipped] = []
        self._rows_read = 0

    def attach(self, processor: Processor) -> None:
        """Use this processor (or tokenizer); what was set up with another one is forgotten."""
        self._processor = processor
        self._kept, self._held_back, self._more, self._skipped = [], [], [], []

    def setup(self, stage: str | None = None) -> None:
        """Choose, check and tokenize the samples; does nothing when that is done already.

        Raises:
            InputError: too few samples, or more than 5 % of them cannot be used.
        """
        if self._kept:
            return
        if self._processor is None:
            raise RuntimeError("CalibrationData.attach(processor) comes before its loaders")
        self._skipped = []
        generator = torch.Generator().manual_seed(self.seed)
        parts = zip(self._encode_conversations(generator), self._encode_text(generator), strict=True)
        kept, held_back, more = (conversations + texts for conversations, texts in parts)
        if not kept:
            raise InputError("No calibration sample is left: raise data.samples or lower data.holdout")
        self._kept, self._held_back, self._more = kept, held_back, more

    def calibration_dataloader(self) -> FixedLoader[Encoded]:
        """All samples that are not held back, once, in a fixed order; every batch holds its share of text windows.

        Each process gets whole batches.
        """
        return FixedLoader(dealt_out(self._batches(self._set_up()._kept), *rank_and_count()), self._collator)

    def first_batches(self, count: int) -> FixedLoader[Encoded]:
        """The first batches of the whole calibration, the same in each process."""
        return FixedLoader([Share(batch) for batch in self._batches(self._set_up()._kept)[:count]], self._collator)

    def tuning_dataloader(self) -> FixedLoader[Encoded]:
        """The same batches; each process gets its share of every one."""
        return FixedLoader(divided(self._batches(self._set_up()._kept), *rank_and_count()), self._collator)

    def train_dataloader(self) -> StatefulLoader[Encoded]:
        """The fine-tuning samples but those held back, shuffled in every epoch; its position survives a resume."""
        self.setup()
        rank, world_size = rank_and_count()
        return StatefulLoader(
            self._kept + self._more,
            self._collator,
            batch_size=self.batch_size,
            kind=_has_image,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def val_dataloader(self) -> FixedLoader[Encoded]:
        """The samples held back, in a fixed order, each batch divided among the processes; empty with holdout 0."""
        return FixedLoader(divided(self._batches(self._set_up()._held_back), *rank_and_count()), self._collator)

    @property
    def _collator(self) -> Collator:
        return Collator(self._processor, pad_to_multiple_of=_PAD_TO_MULTIPLE_OF)

    @property
    def counts(self) -> dict[str, Any]:
        """What really enters: samples, image and text tokens; how many are held back; what is skipped, and why.

        And among how many rows of the conversations the samples were chosen.
        """
        kept = self._set_up()._kept
        return {
            **count_samples(kept),
            "fine_tuning_samples": len(kept) + len(self._more),
            "held_back_samples": len(self._held_back),
            "rows": self._rows_read,
            "skipped": [{"id": skipped.id, "reason": skipped.reason} for skipped in self._skipped],
        }

    def leave_out(self, ids: Sequence[str], reason: str) -> None:
        """From now on do without these samples; they count as skipped."""
        out = {*ids}
        self._set_up()._skipped += [Skipped(name, reason) for name in ids]
        self._kept, self._held_back, self._more = (
            [sample for sample in samples if sample.id not in out]
            for samples in (self._kept, self._held_back, self._more)
        )

    @property
    def parts(self) -> dict[str, list[Encoded]]:
        """All samples: for calibration, held back, and for fine-tuning alone."""
        kept = self._set_up()._kept
        return {"calibration": kept, "held back": self._held_back, "fine-tuning alone": self._more}

    @property
    def skipped(self) -> list[Skipped]:
        """Conversations that did not enter; also after `setup` has refused too many of them."""
        return self._skipped

    @property
    def fingerprint(self) -> str:
        """SHA-256 over ids, tokens and images of all samples: kept, held back, and those for fine-tuning alone."""
        samples = [*self._set_up()._kept, *self._held_back, *self._more]
        return digest_of(((sample.id, sample.input_ids), sample.images) for sample in samples)

    def _set_up(self) -> "CalibrationData":
        self.setup()
        return self

    def _encode_conversations(self, generator: torch.Generator) -> _Split:
        first, count = (wanted - self._texts(wanted) for wanted in (self.samples, self.fine_tuning_samples))
        if count == 0:
            return [], [], []
        samples = self._read_conversations(count)
        groups = spread_over_images(samples, count, generator, together=self.questions_per_image)
        pieces: list[list[Encoded]] = []
        unusable: list[Skipped] = []
        for group in groups:
            encoded, skipped = encode_conversations(group, self._processor, self.max_length, self.counted)
            pieces.append(encoded)
            unusable += skipped
        self._skipped += unusable
        refuse_too_many_skipped(unusable, sum(map(len, groups)))
        by_image = join_overlapping(group_by_image(list(chain.from_iterable(pieces[:first]))))
        kept, held_back = hold_back(by_image, self.holdout)
        taken = {image for sample in held_back for image in sample.images}
        more = [sample for sample in chain.from_iterable(pieces[first:]) if taken.isdisjoint(sample.images)]
        return kept, held_back, more

    def _read_conversations(self, count: int) -> list[Sample]:
        """All of them, or of a source that streams those of `count` images."""
        source = self.source if self.source is not None else EasyVQA()
        rows = rows_to_choose_from(source, count * self.questions_per_image, self.rows)
        stream = SampleStream(source, limit=rows, check_images=False)
        try:
            samples = some_images(stream, count, self.seed) if source.streams else list(stream)
        finally:
            self._skipped, self._rows_read = stream.skipped, stream.position
        if source.streams and is_first():
            _LOG.info("conversations are chosen from the first %d rows of the stream", self._rows_read)
        return samples

    def _encode_text(self, generator: torch.Generator) -> _Split:
        first, count = self._texts(self.samples), self._texts(self.fine_tuning_samples)
        if count == 0:
            return [], [], []
        source = self.text_source if self.text_source is not None else PydocProse()
        stream = SampleStream(source, limit=self.rows, check_images=False)
        try:
            windows = choose_windows(stream, self._processor, length=self.text_length, count=count, generator=generator)
            stream.refuse_if_broken()
        finally:
            self._skipped += stream.skipped
        return *hold_back([[window] for window in windows[:first]], self.holdout), windows[first:]

    def _texts(self, samples: int) -> int:
        """How many of so many samples are text windows."""
        return round(samples * self.text_ratio)

    def _batches(self, samples: Sequence[Encoded]) -> list[Sequence[Encoded]]:
        by_length = sorted(range(len(samples)), key=lambda number: (len(samples[number]), number))
        order = deal([[n for n in by_length if _has_image(samples[n]) == kind] for kind in (True, False)])
        return in_batches([samples[number] for number in order], self.batch_size)


def _has_image(sample: Encoded) -> bool:
    return bool(sample.images)
