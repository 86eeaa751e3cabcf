"""Plain text files."""

from pathlib import Path

from casp_pl.data.sample import Sample
from casp_pl.data.sources.base import DataSource, Split
from casp_pl.errors import ConfigError, InputError

__all__ = ["TextFiles"]


class TextFiles(DataSource):
    """UTF-8 .txt files, one sample per file.

    Args:
        path: a .txt file, or a folder whose .txt files (at any depth) are taken, for calibration.
        test_path: the same for evaluation; without it there is no test split.
    """

    def __init__(self, *, path: Path, test_path: Path | None = None) -> None:
        self.path = Path(path)
        self.test_path = None if test_path is None else Path(test_path)

    def load(self, split: Split) -> list[Sample]:
        """One sample per file that is not blank, by name.

        Raises:
            InputError: no such file, no .txt file in the folder, or a file that is not UTF-8.
            ConfigError: the test split is wanted and `test_path` is not set.
        """
        path = self.path if split == "train" else self.test_path
        if path is None:
            raise ConfigError("TextFiles has no test split: set test_path to held-out text")
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        texts = {file: _read(file) for file in files}
        samples = [Sample(id=str(file), text=text) for file, text in texts.items() if text.strip()]
        if not samples:
            raise InputError(f"TextFiles: no text in {path}: give a .txt file or a folder that holds some")
        return samples


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"TextFiles: cannot read {file}: {error}") from error
