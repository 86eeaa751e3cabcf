"""Plain text files and JSON lines of texts."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from casp_pl.data.sample import Sample
from casp_pl.data.skipped import Skipped
from casp_pl.data.sources.base import DataSource, Row, Split
from casp_pl.data.sources.conversations import MalformedError, check_texts
from casp_pl.data.sources.json_rows import JsonRow, json_rows
from casp_pl.errors import ConfigError, InputError

__all__ = ["TextFiles"]

_ENDINGS = (".txt", ".jsonl")


class TextFiles(DataSource):
    """UTF-8 .txt files, one sample per file, and .jsonl files, one sample per line.

    Args:
        path: a file, or a folder whose .txt and .jsonl files (at any depth) are taken, for calibration.
        test_path: the same for evaluation; without it there is no test split.
        column: the key of the text in the lines of .jsonl files.
    """

    def __init__(self, *, path: Path, test_path: Path | None = None, column: str = "text") -> None:
        self.path = Path(path)
        self.test_path = None if test_path is None else Path(test_path)
        self.column = column

    def rows(self, split: Split, start: int = 0) -> Iterator[Row]:
        """One sample per file or line that is not blank, files by name.

        Skipped are lines without the column, and those whose text is no Unicode.

        Raises:
            InputError: no such file, no text in the folder, or a file that is not UTF-8.
            ConfigError: the test split is wanted and `test_path` is not set.
        """
        path = self.path if split == "train" else self.test_path
        if path is None:
            raise ConfigError("TextFiles has no test split: set test_path to held-out text")
        return islice(self._texts(path), start, None)

    def _texts(self, path: Path) -> Iterator[Row]:
        files = sorted(file for file in path.rglob("*") if file.suffix in _ENDINGS) if path.is_dir() else [path]
        empty = True
        for file in files:
            for row in self._lines(file) if file.suffix == ".jsonl" else [Sample(id=str(file), text=_read(file))]:
                if isinstance(row, Skipped) or (row.text or "").strip():
                    empty = False
                    yield row
        if empty:
            raise InputError(f"TextFiles: no text in {path}: give a .txt or .jsonl file or a folder that holds some")

    def _lines(self, file: Path) -> Iterator[Row]:
        for number, row in enumerate(json_rows(file)):
            name = f"{file}#{number}"
            try:
                yield Sample(id=name, text=self._text(row))
            except MalformedError as error:
                yield Skipped(name, f"{row.place}: {error}")

    def _text(self, row: JsonRow) -> str:
        if row.problem:
            raise MalformedError(row.problem)
        text = row.value.get(self.column) if isinstance(row.value, dict) else None
        if not isinstance(text, str):
            keys = list(row.value) if isinstance(row.value, dict) else type(row.value).__name__
            raise MalformedError(f"no text in the column {self.column!r}, there is {keys}")
        check_texts(text)
        return text


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"TextFiles: cannot read {file}: {error}") from error
