"""Loaders of batches: a fixed order for calibration and evaluation, a shuffled one whose position survives a resume.

What a batch holds does not depend on the number of processes. Where gradients are computed, each process takes its
share of every batch (`divided`); where batches are only looked at, each takes whole ones (`dealt_out`). Every process
makes the same number of steps: one that nothing is left for gets samples that do not count (`batch["counted"]` is
False).
"""

from collections.abc import Callable, Hashable, Iterator, Sequence, Sized
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from casp_pl.errors import ConfigError

__all__ = ["FixedLoader", "Share", "StatefulLoader", "deal", "dealt_out", "divided", "in_batches"]

T = TypeVar("T")
SizedT = TypeVar("SizedT", bound=Sized)
Batch = dict[str, Any]

_RUN = 8  # batches that are sorted by length together


class Share(NamedTuple, Generic[T]):
    """What one process gets of a batch: some samples, and whether they count."""

    samples: Sequence[T]
    counted: bool = True


def in_batches(samples: Sequence[T], batch_size: int) -> list[Sequence[T]]:
    """The samples in their order, `batch_size` at a time."""
    return [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]


def divided(batches: Sequence[Sequence[T]], rank: int, world_size: int) -> list[Share[T]]:
    """Of every batch the share of one process; where it is empty, the first sample, which does not count."""
    return [
        Share(batch[rank::world_size]) if rank < len(batch) else Share(batch[:1], counted=False) for batch in batches
    ]


def dealt_out(batches: Sequence[Sequence[T]], rank: int, world_size: int) -> list[Share[T]]:
    """Of all batches those of one process, whole; in a last round without one, the first, which does not count."""
    rounds = -(-len(batches) // world_size)
    numbers = range(rank, rounds * world_size, world_size)
    return [Share(batches[number]) if number < len(batches) else Share(batches[0], counted=False) for number in numbers]


def deal(lists: Sequence[Sequence[int]]) -> list[int]:
    """The lists merged so that every stretch of the result holds its share of each; each keeps its own order."""
    placed = [
        ((place + 0.5) / len(numbers), kind, number)
        for kind, numbers in enumerate(lists)
        for place, number in enumerate(numbers)
    ]
    return [number for _, _, number in sorted(placed)]


class FixedLoader(Generic[T]):
    """Batches in a fixed order.

    Args:
        batches: this process's share of each batch.
        collate: makes one batch of a list of samples.
    """

    def __init__(self, batches: Sequence[Share[T]], collate: Callable[[Sequence[T]], Batch]) -> None:
        self.batches = batches
        self.collate = collate

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for share in self.batches:
            yield _collated(share, self.collate)


class StatefulLoader(Generic[SizedT]):
    """Shuffled batches, another order in each epoch; after `load_state_dict` it goes on with the next batch.

    Lightning saves and restores the state with its checkpoints. Every batch holds its share of each kind of samples, so
    that no step of training follows one kind alone. Within a kind samples of like length come together: the order is
    random, then sorted by length inside runs of `_RUN` batches, whose batches are shuffled again.

    Args:
        samples: the samples; `len()` of one is its number of tokens.
        collate: makes one batch of a list of samples.
        batch_size: samples per batch, of all processes together.
        kind: tells the kind of a sample; None: all are of one.
        seed: decides the order, together with the epoch.
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        samples: Sequence[SizedT],
        collate: Callable[[Sequence[SizedT]], Batch],
        *,
        batch_size: int,
        kind: Callable[[SizedT], Hashable] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.samples = samples
        self.collate = collate
        self.batch_size = batch_size
        self.kind = kind
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._epoch = 0
        self._position = 0  # batches of the epoch that were handed out
        self._restored = False

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self._position > 0 and not self._restored:
            self._epoch, self._position = self._epoch + 1, 0
        self._restored = False
        batches = self._batches(self._epoch)
        while self._position < len(batches):
            numbers, counted = batches[self._position]
            batch = _collated(Share([self.samples[number] for number in numbers], counted), self.collate)
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, batches handed out in it, and what the order depends on."""
        return {"epoch": self._epoch, "position": self._position, **self._order()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batch that `state` was saved behind.

        Raises:
            ConfigError: the state belongs to other data, another batch size or seed.
        """
        for key, value in self._order().items():
            if state[key] != value:
                raise ConfigError(f"The data cannot be resumed: {key} was {state[key]} and is {value} now")
        self._epoch, self._position = state["epoch"], state["position"]
        if self._position >= len(self):
            self._epoch, self._position = self._epoch + 1, 0
        self._restored = True

    def _order(self) -> dict[str, int]:
        return {"samples": len(self.samples), "batch_size": self.batch_size, "seed": self.seed}

    def _batches(self, epoch: int) -> list[Share[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.samples), generator=generator).tolist()
        runs = in_batches(deal(self._by_kind(order)), _RUN * self.batch_size)
        batches = [batch for run in runs for batch in in_batches(self._sorted(run), self.batch_size)]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return divided([batches[number] for number in shuffled], self.rank, self.world_size)

    def _sorted(self, run: Sequence[int]) -> list[int]:
        return deal([sorted(numbers, key=lambda number: len(self.samples[number])) for numbers in self._by_kind(run)])

    def _by_kind(self, order: Sequence[int]) -> list[list[int]]:
        kinds: dict[Hashable, list[int]] = {}
        for number in order:
            kinds.setdefault(self.kind(self.samples[number]) if self.kind else None, []).append(number)
        return list(kinds.values())


def _collated(share: Share[T], collate: Callable[[Sequence[T]], Batch]) -> Batch:
    batch = collate(share.samples)
    return batch if share.counted else batch | {"counted": False}
