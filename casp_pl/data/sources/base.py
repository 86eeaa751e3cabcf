"""What every data source does."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal, TypeAlias

from casp_pl.data.sample import Sample
from casp_pl.data.skipped import Skipped

__all__ = ["DataSource", "Row", "Split"]

Split: TypeAlias = Literal["train", "test"]

Row: TypeAlias = Sample | Skipped
"""One row of a data set: a sample, or why there is none."""


class DataSource(ABC):
    """Samples of a data set, row by row. Images are named and opened only when they are used.

    Attributes:
        streams: whether images come with their rows, so that a look at all rows would fetch all images and hold them;
            of such a source only as many rows are looked at as are needed (`casp_pl.data.stream`).
    """

    streams: bool = False

    @abstractmethod
    def rows(self, split: Split, start: int = 0) -> Iterator[Row]:
        """The rows of a split from number `start` on, the same ones in the same order at every call.

        `start` is at most the number of rows. They are read as far as they are asked for, so that a large data set
        need not fit in memory.

        Raises:
            InputError: the data is missing or broken; the message names the file or the sample.
        """

    def load(self, split: Split) -> list[Sample]:
        """All samples of a split at once; what cannot be one is left out (`SampleStream` tells what and why)."""
        return [row for row in self.rows(split) if isinstance(row, Sample)]
