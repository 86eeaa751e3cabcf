"""Loaders of batches: a fixed order for calibration and evaluation, a shuffled one whose position survives a resume.

Every rank makes the same number of steps: the order is cut into pieces of batch_size x world_size samples, and each
rank takes its share of each piece. Samples are repeated only where the last piece holds fewer samples than there are
ranks.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence, Sized
from typing import Any, Generic, TypeVar

import torch

from casp_pl.errors import ConfigError

__all__ = ["FixedLoader", "StatefulLoader", "deal", "rank_batches"]

T = TypeVar("T")
SizedT = TypeVar("SizedT", bound=Sized)
Batch = dict[str, Any]

_RUN = 8  # batches that are sorted by length together


def rank_batches(order: Sequence[int], batch_size: int, *, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """The batches of one rank: at most `batch_size` numbers each, equally many batches on every rank."""
    step = batch_size * world_size
    batches = []
    for start in range(0, len(order), step):
        piece = list(order[start : start + step])
        piece += [piece[number % len(piece)] for number in range(world_size - len(piece))]
        batches.append(piece[rank::world_size])
    return batches


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
        batches: the samples of each batch.
        collate: makes one batch of a list of samples.
    """

    def __init__(self, batches: Sequence[Sequence[T]], collate: Callable[[Sequence[T]], Batch]) -> None:
        self.batches = batches
        self.collate = collate

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield self.collate(batch)


class StatefulLoader(Generic[SizedT]):
    """Shuffled batches, another order in each epoch; after `load_state_dict` it goes on with the next batch.

    Lightning saves and restores the state with its checkpoints. Every batch holds its share of each kind of samples, so
    that no step of training follows one kind alone. Within a kind samples of like length come together: the order is
    random, then sorted by length inside runs of `_RUN` batches, whose batches are shuffled again.

    Args:
        samples: the samples; `len()` of one is its number of tokens.
        collate: makes one batch of a list of samples.
        batch_size: samples per batch and rank.
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
        return -(-len(self.samples) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        if self._position > 0 and not self._restored:
            self._epoch, self._position = self._epoch + 1, 0
        self._restored = False
        batches = self._batches(self._epoch)
        while self._position < len(batches):
            batch = self.collate([self.samples[number] for number in batches[self._position]])
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, batches handed out in it, and what the order depends on."""
        return {"epoch": self._epoch, "position": self._position, **self._order()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batch that `state` was saved behind.

        Raises:
            ConfigError: the state belongs to other data, another batch size, seed or number of processes.
        """
        for key, value in self._order().items():
            if state[key] != value:
                raise ConfigError(f"The data cannot be resumed: {key} was {state[key]} and is {value} now")
        self._epoch, self._position = state["epoch"], state["position"]
        if self._position >= len(self):
            self._epoch, self._position = self._epoch + 1, 0
        self._restored = True

    def _order(self) -> dict[str, int]:
        size = {"samples": len(self.samples), "batch_size": self.batch_size}
        return size | {"seed": self.seed, "world_size": self.world_size}

    def _batches(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.samples), generator=generator).tolist()
        step = self.batch_size * self.world_size
        pieces = [
            piece for run in _pieces(self._dealt(order), _RUN * step) for piece in _pieces(self._sorted(run), step)
        ]
        shuffled = torch.randperm(len(pieces), generator=generator).tolist()
        return [
            rank_batches(pieces[number], self.batch_size, rank=self.rank, world_size=self.world_size)[0]
            for number in shuffled
        ]

    def _dealt(self, order: Sequence[int]) -> list[int]:
        return deal(self._by_kind(order))

    def _sorted(self, run: Sequence[int]) -> list[int]:
        return deal([sorted(numbers, key=lambda number: len(self.samples[number])) for numbers in self._by_kind(run)])

    def _by_kind(self, order: Sequence[int]) -> list[list[int]]:
        kinds: dict[Hashable, list[int]] = {}
        for number in order:
            kinds.setdefault(self.kind(self.samples[number]) if self.kind else None, []).append(number)
        return list(kinds.values())


def _pieces(order: Sequence[int], size: int) -> list[Sequence[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]
