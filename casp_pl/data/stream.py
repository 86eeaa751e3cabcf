"""A source as a stream of usable samples: what is skipped is counted, and a stopped pass goes on where it was.

Samples are chosen among all rows of a source, or of one that streams among its first ones: those that are needed, and
as many more as `shuffle` of a stream of the package datasets has in its buffer unless it is told otherwise.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from casp_pl.data.images import ImageRefusedError, load_image
from casp_pl.data.sample import Sample
from casp_pl.data.skipped import MAX_SKIPPED_SHARE, Skipped, refuse_too_many_skipped
from casp_pl.data.sources import DataSource, Split
from casp_pl.errors import ConfigError

__all__ = ["SampleStream", "rows_to_choose_from"]

_BUFFER = 1000
_FAIR = 100  # rows, of which one that is broken is no large share


def rows_to_choose_from(source: DataSource, needed: int | None, limit: int | None = None) -> int | None:
    """How many of its first rows are looked at for `needed` of them; None for all.

    Args:
        source: the rows.
        needed: None for all.
        limit: what the user says, which counts before all else.
    """
    if limit is not None or needed is None or not source.streams:
        return limit
    return needed + _BUFFER


class SampleStream:
    """The usable samples of a source, pass after pass; after `load_state_dict` a pass goes on with the next row.

    Each pass is the same, and counts anew what it skips.

    Args:
        source: where the rows come from.
        split: which ones.
        limit: rows of a pass; None reads all.
        check_images: decode every image to see that it can be; what cannot be is skipped with its path and the reason.

    Attributes:
        position: rows of this pass that were read.
        skipped: those of them that are no samples.
    """

    def __init__(
        self, source: DataSource, split: Split = "train", *, limit: int | None = None, check_images: bool = True
    ) -> None:
        self.source = source
        self.split = split
        self.limit = limit
        self.check_images = check_images
        self.position = 0
        self.skipped: list[Skipped] = []
        self._last: str | None = None
        self._restored = False

    def __iter__(self) -> Iterator[Sample]:
        """The samples of this pass.

        Raises:
            InputError: more than 5 % of the rows of the pass are skipped, told at its end; or what the source finds.
        """
        if not self._restored:
            self.position, self.skipped, self._last = 0, [], None
        self._restored = False
        left = None if self.limit is None else self.limit - self.position
        for row in islice(self.source.rows(self.split, self.position), left):
            self.position += 1
            self._last = row.id
            skipped = row if isinstance(row, Skipped) else self._refused(row)
            if skipped is not None:
                self.skipped.append(skipped)
            elif isinstance(row, Sample):
                yield row
        refuse_too_many_skipped(self.skipped, self.position)

    def refuse_if_broken(self) -> None:
        """Judge a pass that was left before its end; one bad row among few is no reason, so that more are read then.

        Raises:
            InputError: more than 5 % of the rows that were read, or of the first 100, are skipped.
        """
        if len(self.skipped) > MAX_SKIPPED_SHARE * self.position:
            self._restored = True
            for _ in self:
                if self.position >= _FAIR:
                    break
            refuse_too_many_skipped(self.skipped, self.position)

    def state_dict(self) -> dict[str, Any]:
        """How far this pass is, and what it skipped; JSON."""
        skipped = [[entry.id, entry.reason] for entry in self.skipped]
        return {"position": self.position, "last": self._last, "skipped": skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the row that `state` was saved behind.

        Raises:
            ConfigError: there is another row in its place now.
        """
        position, last = int(state["position"]), state["last"]
        if position:
            found = next(self.source.rows(self.split, position - 1), None)
            if found is None or found.id != last:
                now = "there is none" if found is None else f"is {found.id}"
                raise ConfigError(f"The data cannot be resumed: row {position - 1} was {last} and {now} now")
        self.position, self._last = position, last
        self.skipped = [Skipped(*entry) for entry in state["skipped"]]
        self._restored = True

    def _refused(self, sample: Sample) -> Skipped | None:
        if self.check_images:
            try:
                for image in sample.images:
                    load_image(image)
            except ImageRefusedError as error:
                return Skipped(sample.id, str(error))
        return None
