"""What every data source does."""

from abc import ABC, abstractmethod
from typing import Literal, TypeAlias

from casp_pl.data.sample import Sample

__all__ = ["DataSource", "Split"]

Split: TypeAlias = Literal["train", "test"]


class DataSource(ABC):
    """Samples of a data set. Images are named by path and opened only when they are used."""

    @abstractmethod
    def load(self, split: Split) -> list[Sample]:
        """All samples of a split, always in the same order.

        Raises:
            InputError: the data is missing or broken; the message names the file or the sample.
        """
