"""What every stage is judged on: the same test questions about images and the same windows of held-out text."""

from itertools import chain, islice
from typing import Any

import lightning.pytorch as pl
import torch

from casp_pl.data.collate import pad_right
from casp_pl.data.contents import digest_of
from casp_pl.data.evaluation_work import EvaluationWork, count_work
from casp_pl.data.loaders import FixedLoader, dealt_out, in_batches
from casp_pl.data.questions import QuestionCollator, QuestionGroup, batch_groups, choose_questions, encode_questions
from casp_pl.data.sample import Sample
from casp_pl.data.selection import some_images
from casp_pl.data.skipped import Skipped, refuse_too_many_skipped
from casp_pl.data.sources import DataSource, EasyVQA, PydocProse
from casp_pl.data.stream import SampleStream, rows_to_choose_from
from casp_pl.data.tokenize import Encoded, Processor, encode_windows, takes_images
from casp_pl.errors import ConfigError, InputError
from casp_pl.processes import rank_and_count

__all__ = ["EvaluationData", "question_loader", "window_loader"]


class EvaluationData(pl.LightningDataModule):
    """Test questions grouped by image and windows of held-out text, always the same for the same settings and seed.

    Each process evaluates some of the batches. A text model gets the text alone.

    Args:
        source: where the questions come from (its test split; of a conversation the first turn); easy-VQA if not given.
        text_source: where the text comes from (its test split); the prose of Python's language reference if not given.
        questions: number of questions, by whole images in random order; null takes all, 0 none.
        text_tokens: number of text tokens, rounded down to whole windows; 0 takes none.
        window: tokens of a text window.
        images_per_batch: images whose questions are answered together.
        windows_per_batch: text windows per batch.
        max_new_tokens: longest answer.
        seed: decides which questions are taken.
    """

    def __init__(
        self,
        *,
        source: DataSource | None = None,
        text_source: DataSource | None = None,
        questions: int | None = 1000,
        text_tokens: int = 6144,
        window: int = 256,
        images_per_batch: int = 8,
        windows_per_batch: int = 8,
        max_new_tokens: int = 6,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(images_per_batch, windows_per_batch, max_new_tokens) < 1 or window < 2:
            raise ConfigError(
                "evaluation: images_per_batch, windows_per_batch and max_new_tokens are at least 1, window at least 2"
            )
        if (questions is not None and questions < 0) or text_tokens < 0:
            raise ConfigError(f"evaluation: questions ({questions}) and text_tokens ({text_tokens}) cannot be negative")
        if 0 < text_tokens < window:
            raise ConfigError(f"evaluation.text_tokens ({text_tokens}) is less than one window of {window} tokens")
        self.source = source
        self.text_source = text_source
        self.questions = questions
        self.text_tokens = text_tokens
        self.window = window
        self.images_per_batch = images_per_batch
        self.windows_per_batch = windows_per_batch
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self._processor: Processor = None
        self._groups: list[QuestionGroup] | None = None
        self._windows: list[Encoded] = []
        self._skipped: list[Skipped] = []

    def attach(self, processor: Processor) -> None:
        """Use this processor (or tokenizer); what was set up with another one is forgotten."""
        self._processor = processor
        self._groups = None

    def setup(self, stage: str | None = None) -> None:
        """Choose, check and tokenize; does nothing when that is done already.

        Raises:
            InputError: there is no question or not enough text, or more than 5 % of the questions cannot be used.
        """
        if self._groups is not None:
            return
        if self._processor is None:
            raise RuntimeError("EvaluationData.attach(processor) comes before its loaders")
        self._skipped = []
        self._windows = self._encode_text()
        self._groups = self._encode_questions()

    def test_dataloader(self) -> list[FixedLoader[Any]]:
        """The questions, then the text windows; a part that is not wanted is left out."""
        self.setup()
        loaders: list[FixedLoader[Any]] = []
        if self._groups:
            loaders.append(question_loader(self._groups, self._processor, self.images_per_batch))
        if self._windows:
            loaders.append(window_loader(self._windows, self.windows_per_batch))
        return loaders

    @property
    def counts(self) -> dict[str, Any]:
        """Questions, images and text tokens that are evaluated; the questions and texts skipped, with the reasons."""
        self.setup()
        groups = self._groups or []
        return {
            "questions": sum(len(group.samples) for group in groups),
            "images": len({group.image_number for group in groups}),
            "text_tokens": sum(map(len, self._windows)),
            "skipped": [{"id": skipped.id, "reason": skipped.reason} for skipped in self._skipped],
        }

    @property
    def work(self) -> EvaluationWork:
        """What one evaluation computes, in all processes together."""
        self.setup()
        return count_work(
            batch_groups(self._groups or [], self.images_per_batch),
            self._processor,
            max_new_tokens=self.max_new_tokens,
            windows=len(self._windows),
            window=self.window,
            windows_per_batch=self.windows_per_batch,
        )

    @property
    def samples(self) -> list[Sample]:
        """The questions, in the order of their numbers."""
        self.setup()
        return [sample for group in self._groups or [] for sample in group.samples]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all questions with their answers, tokens and images, and over the tokens of all windows."""
        self.setup()
        questions = (
            ((sample.id, sample.turns, sample.answers, sample.category, group.prefix.input_ids, suffix), sample.images)
            for group in self._groups or []
            for sample, suffix in zip(group.samples, group.suffixes, strict=True)
        )
        return digest_of(chain(questions, ((window.input_ids, ()) for window in self._windows)))

    def _encode_questions(self) -> list[QuestionGroup]:
        if self.questions == 0 or not takes_images(self._processor):
            return []
        source = self.source if self.source is not None else EasyVQA()
        rows = rows_to_choose_from(source, self.questions)
        stream = SampleStream(source, "test", limit=rows, check_images=False)
        if source.streams and self.questions is not None:
            samples = some_images(stream, self.questions, self.seed)
        else:
            samples = list(stream)
        samples = choose_questions(samples, self.questions, self.seed)
        if not samples:
            raise InputError("The evaluation source has no questions: give another, or set evaluation.questions to 0")
        groups, unusable = encode_questions(samples, self._processor)
        refuse_too_many_skipped(unusable, len(samples))
        self._skipped += stream.skipped + unusable
        return groups

    def _encode_text(self) -> list[Encoded]:
        wanted = self.text_tokens // self.window
        if wanted == 0:
            return []
        source = self.text_source if self.text_source is not None else PydocProse()
        texts = SampleStream(source, "test", check_images=False)  # read only as far as there are windows to fill
        windows = list(islice(encode_windows(texts, self._processor, length=self.window), wanted))
        if len(windows) < wanted:
            raise InputError(
                f"evaluation.text_tokens is {self.text_tokens}, but the held-out text has only "
                f"{len(windows) * self.window} tokens in windows of {self.window}: lower it"
            )
        texts.refuse_if_broken()
        self._skipped += texts.skipped
        return windows


def question_loader(
    groups: list[QuestionGroup], processor: Processor, images_per_batch: int
) -> FixedLoader[QuestionGroup]:
    """Batches as `QuestionCollator` makes them."""
    return FixedLoader(
        dealt_out(batch_groups(groups, images_per_batch), *rank_and_count()), QuestionCollator(processor)
    )


def window_loader(windows: list[Encoded], windows_per_batch: int) -> FixedLoader[Encoded]:
    """Batches of input_ids (B, T) and the windows' numbers (B,); all windows have one length."""
    numbered = {window.id: number for number, window in enumerate(windows)}

    def collate(batch: Any) -> dict[str, Any]:
        ids = pad_right([window.input_ids for window in batch], 0)
        return {"input_ids": ids, "numbers": torch.tensor([numbered[window.id] for window in batch])}

    return FixedLoader(dealt_out(in_batches(windows, windows_per_batch), *rank_and_count()), collate)
