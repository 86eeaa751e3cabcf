"""Data sets of Hugging Face, from disk or from the hub: texts, or conversations and questions with images.

A data set on disk is a folder that `save_to_disk` wrote, or one of files that `load_dataset` knows: parquet, arrow,
CSV, JSON, or images with a metadata file (imagefolder).
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from casp_pl.data.images import ImageSource, StoredImage
from casp_pl.data.sample import IMAGE_MARK, Sample
from casp_pl.data.skipped import Skipped
from casp_pl.data.sources.base import DataSource, Row, Split
from casp_pl.data.sources.conversations import MalformedError, make_sample, split_turns
from casp_pl.errors import ConfigError, InputError

__all__ = ["HuggingFaceConversations", "HuggingFaceText"]

_TIMEOUT = 5.0  # seconds
_SAVED_TO_DISK = ("dataset_dict.json", "state.json")


class HuggingFaceText(DataSource):
    """One text column of a data set; blank rows are left out. Needs the package datasets.

    Args:
        name: a folder, or the name of a data set on the hub, such as Salesforce/wikitext.
        config: configuration of a data set on the hub, such as wikitext-2-raw-v1.
        column: the column that holds the text.
        train_split: name of the split used for calibration.
        test_split: name of the split used for evaluation.
        limit: take only that many rows from the beginning; None takes all.
        streaming: read rows as they are needed, instead of fetching all of the data set first.
    """

    def __init__(
        self,
        *,
        name: str,
        config: str | None = None,
        column: str = "text",
        train_split: str = "train",
        test_split: str = "test",
        limit: int | None = None,
        streaming: bool = False,
    ) -> None:
        self.name = name
        self.config = config
        self.column = column
        self.splits = {"train": train_split, "test": test_split}
        self.limit = limit
        self.streaming = streaming

    def rows(self, split: Split, start: int = 0) -> Iterator[Row]:
        """One sample per row with text, in the order of the data set.

        Raises:
            InputError: the data set, its split or its column is missing, or the hub cannot be reached.
        """
        return islice(self._texts(split), start, None)

    def _texts(self, split: Split) -> Iterator[Row]:
        rows = _open(self.name, self.config, self.splits[split], (self.column,), streaming=self.streaming)
        with _told(self.name, self.splits[split]):
            for number, row in enumerate(islice(rows, self.limit)):
                text = row[self.column]
                if isinstance(text, str) and text.strip():
                    yield Sample(id=f"{self.name}/{split}/{number}", text=text)


class HuggingFaceConversations(DataSource):
    """Conversations, or single questions with their answers, of a data set with images or without.

    Give either `conversations`, or `question` and `answer`. Needs the package datasets.

    Args:
        name: a folder, or the name of a data set on the hub.
        config: configuration of a data set on the hub.
        conversations: the column of conversations, each a list of {"from": "human" or "gpt", "value": text} or of
            {"role": "user" or "assistant", "content": text}, with `<image>` where images belong, or without.
        question: the column of questions.
        answer: the column of answers; of a list of answers the first is taken.
        image: the column of images, one or a list in each row; None for text alone.
        train_split: name of the split used for calibration.
        test_split: name of the split used for evaluation.
        streaming: read rows as they are needed, and no more rows than that, instead of fetching all of the data set
            first; what `save_to_disk` wrote is here already, and any of its rows may be chosen.
    """

    def __init__(
        self,
        *,
        name: str,
        config: str | None = None,
        conversations: str | None = None,
        question: str | None = None,
        answer: str | None = None,
        image: str | None = "image",
        train_split: str = "train",
        test_split: str = "test",
        streaming: bool = True,
    ) -> None:
        if (conversations is None) == (question is None) or (question is None) != (answer is None):
            raise ConfigError(
                "HuggingFaceConversations needs the name of the column `conversations`, or those of `question` and "
                "`answer`"
            )
        self.name = name
        self.config = config
        self.conversations = conversations
        self.question = question
        self.answer = answer
        self.image = image
        self.splits = {"train": train_split, "test": test_split}
        self.streaming = streaming
        self.streams = streaming and not _is_saved(name)

    def rows(self, split: Split, start: int = 0) -> Iterator[Row]:
        """One sample per row, in the order of the data set.

        Skipped are rows without an answer, with a lost image, or that are no conversation.

        Raises:
            InputError: the data set, its split or a column is missing, or the hub cannot be reached.
        """
        columns = [name for name in (self.conversations, self.question, self.answer, self.image) if name is not None]
        rows = _open(self.name, self.config, self.splits[split], columns, streaming=self.streaming)
        with _told(self.name, self.splits[split]):
            rows = _undecoded(rows, self.image)
            for number, row in enumerate(_from(rows, start), start=start):
                again = None if self.streams else partial(_bytes_again, rows, number, self.image)
                yield self._row(row, f"{self.name}/{split}/{number}", again)

    def _row(self, row: dict[Any, Any], name: str, again: Callable[[int], bytes] | None) -> Row:
        try:
            return self._sample(row, name, again)
        except MalformedError as error:
            return Skipped(name, str(error))

    def _sample(self, row: dict[Any, Any], name: str, again: Callable[[int], bytes] | None) -> Row:
        if self.conversations is not None:
            questions, answers = split_turns(row[self.conversations] or [])
        else:
            answer = row[self.answer]
            answer = answer[0] if isinstance(answer, list) and answer else answer
            if not (isinstance(row[self.question], str) and isinstance(answer, str)):
                return Skipped(name, f"no text in the columns {self.question!r} and {self.answer!r}")
            questions, answers = [row[self.question]], [answer]
        stored = [] if self.image is None else row[self.image]
        if stored is None and self.conversations is not None and not any(IMAGE_MARK in text for text in questions):
            stored = []  # a conversation without an image among others with one
        stored = stored if isinstance(stored, list) else [stored]
        images = [
            _image(image, self.name, None if again is None else partial(again, place))
            for place, image in enumerate(stored)
        ]
        if None in images:
            return Skipped(name, f"no image in the column {self.image!r}")
        found = [image for image in images if image is not None]
        return make_sample(name, questions, answers, found, marks=None)


def _image(stored: Any, name: str, again: Callable[[], bytes] | None) -> ImageSource | None:
    """A file of its own, or bytes, called by their hash: the same image in two rows is one image.

    Where they can be read `again`, they are not kept.
    """
    if isinstance(stored, dict) and stored.get("bytes") is None and stored.get("path"):
        return Path(stored["path"])
    data = _bytes_of(stored)
    if not isinstance(data, bytes):
        return None
    return StoredImage(f"{name}#{hashlib.sha256(data).hexdigest()[:16]}", again or partial(bytes, data))


def _bytes_of(stored: Any) -> Any:
    return stored.get("bytes") if isinstance(stored, dict) else stored


def _bytes_again(rows: Any, number: int, column: str | None, place: int) -> bytes:
    """The bytes of an image of a row of a data set on disk."""
    stored = rows[number][column]
    data: bytes = _bytes_of(stored[place] if isinstance(stored, list) else stored)
    return data


def _undecoded(rows: Any, image: str | None) -> Any:
    """The rows with images as the bytes that are stored: we decode them ourselves, safely and later."""
    import datasets

    feature = None if image is None or rows.features is None else rows.features[image]
    if isinstance(feature, datasets.Image):
        return rows.cast_column(image, datasets.Image(decode=False))
    if isinstance(getattr(feature, "feature", None), datasets.Image):
        return rows.cast_column(image, datasets.List(datasets.Image(decode=False)))
    return rows


def _from(rows: Any, start: int) -> Any:
    return rows.skip(start) if start else rows


def _open(name: str, config: str | None, split: str, columns: Sequence[str], *, streaming: bool) -> Any:
    """The split with these columns alone.

    Raises:
        InputError: the data set, the split or a column is missing.
    """
    with _told(name, split):
        rows = _load(name, config, split, streaming=streaming)
        names = rows.column_names or list(next(iter(rows), {}))
    missing = [column for column in columns if column not in names]
    if missing:
        raise InputError(f"Data set {name} has no column {missing[0]!r}: it has {names}")
    return rows.select_columns(list(columns))


def _is_saved(name: str) -> bool:
    """Whether `save_to_disk` wrote that folder."""
    return any((Path(name) / file).is_file() for file in _SAVED_TO_DISK)


def _load(name: str, config: str | None, split: str, *, streaming: bool) -> Any:
    import datasets

    if not Path(name).is_dir():
        _check_hub(name)
    elif _is_saved(name):
        stored = datasets.load_from_disk(name)
        return stored[split] if isinstance(stored, datasets.DatasetDict) else stored
    return datasets.load_dataset(name, config, split=split, streaming=streaming)


@contextmanager
def _told(name: str, split: str) -> Iterator[None]:
    """What goes wrong inside is told as an error of the data set."""
    import datasets

    broken = (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        yield
    except broken as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"Data set {name}, split {split!r}, cannot be read: {reason}") from error


def _check_hub(name: str) -> None:
    """One short request: without it, the library retries for half a minute before it says that there is no network."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_TIMEOUT).close()
    except HTTPError:
        return  # it answered
    except OSError as error:
        raise InputError(
            f"Data set {name} is not a folder here, and {constants.ENDPOINT} cannot be reached ({error})\n"
            "Give a folder written by save_to_disk, or set HF_HUB_OFFLINE=1 to use what was downloaded before"
        ) from error
