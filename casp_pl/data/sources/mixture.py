"""Several sources as one, each with its share of the rows."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isfinite

from casp_pl.data.sources.base import DataSource, Row, Split
from casp_pl.errors import ConfigError

__all__ = ["Mixture"]


class Mixture(DataSource):
    """Rows of several sources by weight, until the first of them has no more.

    Nothing is drawn by chance: the next row comes from the source that is furthest behind its share, so every stretch
    of the mixture has the weights, and its n-th row is the same one at every reading.

    Args:
        sources: what is mixed.
        weights: shares of the rows, in any unit; the same for all if not given.
    """

    def __init__(self, *, sources: list[DataSource], weights: list[float] | None = None) -> None:
        weights = [1.0] * len(sources) if weights is None else weights
        if len(weights) != len(sources) or not sources:
            raise ConfigError(f"Mixture: {len(weights)} weights for {len(sources)} sources; give one for each")
        if not all(isfinite(weight) and weight > 0 for weight in weights):
            raise ConfigError(f"Mixture: the weights {weights} must be above 0; leave out a source that is not wanted")
        self.sources = sources
        self.weights = [weight / sum(weights) for weight in weights]
        self.streams = any(source.streams for source in sources)

    def rows(self, split: Split, start: int = 0) -> Iterator[Row]:
        """The rows in turns; the number of the source stands in front of each id.

        Raises:
            InputError: whatever a source finds.
        """
        taken = [0] * len(self.sources)
        for _ in range(start):
            taken[self._next(taken)] += 1
        streams = [source.rows(split, count) for source, count in zip(self.sources, taken, strict=True)]
        while True:
            chosen = self._next(taken)
            row = next(streams[chosen], None)
            if row is None:
                return
            taken[chosen] += 1
            yield replace(row, id=f"{chosen}/{row.id}")

    def _next(self, taken: Sequence[int]) -> int:
        """The source that is furthest behind its share of the rows taken so far and the next one."""
        total = sum(taken) + 1
        behind = [weight * total - count for weight, count in zip(self.weights, taken, strict=True)]
        return behind.index(max(behind))
