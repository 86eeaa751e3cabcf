"""Text of a Hugging Face data set, from disk or from the hub."""

from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from casp_pl.data.sample import Sample
from casp_pl.data.sources.base import DataSource, Split
from casp_pl.errors import InputError

__all__ = ["HuggingFaceText"]

_TIMEOUT = 5.0  # seconds


class HuggingFaceText(DataSource):
    """One text column of a data set; blank rows are left out. Needs the package datasets.

    Args:
        name: a folder written by `save_to_disk`, or the name of a data set on the hub, such as Salesforce/wikitext.
        config: configuration of a data set on the hub, such as wikitext-2-raw-v1.
        column: the column that holds the text.
        train_split: name of the split used for calibration.
        test_split: name of the split used for evaluation.
        limit: take only that many rows from the beginning; None takes all.
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
    ) -> None:
        self.name = name
        self.config = config
        self.column = column
        self.splits = {"train": train_split, "test": test_split}
        self.limit = limit

    def load(self, split: Split) -> list[Sample]:
        """One sample per row with text, in the order of the data set.

        Raises:
            InputError: the data set, its split or its column is missing, or the hub cannot be reached.
        """
        rows = self._read(self.splits[split])
        if self.column not in rows.column_names:
            raise InputError(f"Data set {self.name} has no column {self.column!r}: it has {rows.column_names}")
        texts = rows.select_columns([self.column])[: self.limit][self.column]
        return [
            Sample(id=f"{self.name}/{split}/{number}", text=text)
            for number, text in enumerate(texts)
            if isinstance(text, str) and text.strip()
        ]

    def _read(self, split: str) -> Any:
        import datasets

        try:
            if Path(self.name).is_dir():
                stored = datasets.load_from_disk(self.name)
                return stored[split] if isinstance(stored, datasets.DatasetDict) else stored
            _check_hub(self.name)
            return datasets.load_dataset(self.name, self.config, split=split)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"Data set {self.name}, split {split!r}, cannot be read: {reason}") from error


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
