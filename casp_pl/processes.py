"""What the processes of one run say to each other; alone, a process hears what it says itself.

Everything goes through torch.distributed's default group. Every process has to make the same calls in the same order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from casp_pl.errors import ResourceError

__all__ = [
    "RowShare",
    "is_first",
    "is_lost_connection",
    "largest_of_all",
    "lost_process",
    "mean_of_all",
    "of_all",
    "process_count",
    "process_rank",
    "rank_and_count",
    "said_by_first",
    "sum_in_order",
    "sum_of_all",
    "wait_for_all",
]

T = TypeVar("T")

_LEAST_ROWS = 32  # of a process that shares products
_PARTS = 24  # that a sum over rows is made of, as many for each of 2, 3, 4, 6, 8, 12 or 24 processes


def process_count() -> int:
    """How many processes run together."""
    return dist.get_world_size() if _together() else 1


def process_rank() -> int:
    """The number of this one."""
    return dist.get_rank() if _together() else 0


def rank_and_count() -> tuple[int, int]:
    """Both, for what shares something out."""
    return process_rank(), process_count()


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return process_rank() == 0


def sum_of_all(tensor: Tensor) -> Tensor:
    """The sum over processes of a tensor of one shape and dtype; its own is not changed."""
    if process_count() == 1:
        return tensor
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    with _others_alive():
        dist.all_reduce(total)
    return total


def mean_of_all(tensor: Tensor) -> Tensor:
    """The mean over processes; alone, the tensor itself."""
    return tensor if process_count() == 1 else sum_of_all(tensor) / process_count()


def largest_of_all(number: int, device: torch.device) -> int:
    """The largest over processes of a small number; `device` is one that the backend takes tensors of."""
    if process_count() == 1:
        return number
    largest = torch.tensor(number, device=device)
    with _others_alive():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def of_all(value: T) -> list[T]:
    """What every process gave, in the order of ranks. For small things: they are pickled."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    with _others_alive():
        dist.all_gather_object(values, value)
    return values


def said_by_first(value: T) -> T:
    """What the first process gave."""
    if process_count() == 1:
        return value
    values = [value]
    with _others_alive():
        dist.broadcast_object_list(values, src=0)
    return values[0]


class RowShare(NamedTuple):
    """The rows of a matrix that this process computes where several compute one matrix together.

    All rows are a fixed number of parts, and a process has whole ones: what is summed part by part comes out the same,
    to the last bit, however many processes there are.

    Attributes:
        rows: of all processes together.
        together: False: this process has all of them, and nothing is exchanged.
    """

    rows: int
    together: bool = False

    @classmethod
    def of_products(cls, rows: int, together: bool) -> "RowShare":
        """For rows that matrices are multiplied with, where each process gets enough of them; else each does all.

        Single rows of a product in float32 are the same, to the last bit, whatever the others are, unless these are
        few: MKL with AVX2 multiplies up to 11 in another way. Error feedback makes a weight's codes of such a bit.
        """
        return cls(rows, together and rows >= _LEAST_ROWS * process_count())

    @property
    def own(self) -> slice:
        """The rows of this process."""
        return self._of(process_rank()) if self.together else slice(0, self.rows)

    @property
    def bounds(self) -> list[int]:
        """Where the parts of the own rows begin, counted from the first of these, and where the last one ends."""
        parts, rows = RowShare(_part_count(), self.together).own, self.own
        return [self.rows * part // _part_count() - rows.start for part in range(parts.start, parts.stop + 1)]

    def sum(self, parts: Tensor) -> Tensor:
        """The sum over the parts of all processes, in every process, from the sums (own parts, ...) of each one's."""
        return sum_in_order(RowShare(_part_count(), self.together).join(parts))

    def join(self, part: Tensor, dim: int = 0) -> Tensor:
        """The whole tensor, in every process, from each one's rows along `dim`."""
        if not self.together or process_count() == 1:
            return part
        lengths = [share.stop - share.start for share in map(self._of, range(process_count()))]
        padded = part.new_zeros(max(lengths), *part.movedim(dim, 0).shape[1:])  # gloo gathers like shapes only
        padded[: part.shape[dim]] = part.movedim(dim, 0)
        parts = [torch.empty_like(padded) for _ in lengths]
        with _others_alive():
            dist.all_gather(parts, padded)
        whole = torch.cat([other[:length] for other, length in zip(parts, lengths, strict=True)])
        return whole.movedim(0, dim).contiguous()

    def _of(self, rank: int) -> slice:
        parts = _part_count()
        first, last = parts * rank // process_count(), parts * (rank + 1) // process_count()
        return slice(self.rows * first // parts, self.rows * last // parts)


def _part_count() -> int:
    return _PARTS * -(-process_count() // _PARTS)


def sum_in_order(parts: Tensor) -> Tensor:
    """The sum (...) of parts (P, ...), one after the other; `Tensor.sum` does not say in which order it adds."""
    first, *others = parts
    total: Tensor = first.clone()
    for other in others:
        total += other
    return total


def wait_for_all() -> None:
    """Returns once every process is here."""
    of_all(None)


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _others_alive() -> Iterator[None]:
    """Turns the backend's error about a lost connection into one line."""
    try:
        yield
    except RuntimeError as error:
        raise lost_process(error) from error


def is_lost_connection(error: BaseException) -> bool:
    """Whether the backend (gloo, NCCL) raised it because another process cannot be reached."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def lost_process(error: BaseException) -> ResourceError:
    """What to tell about the backend's error."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ResourceError(
        f"Process {process_rank()} hears nothing of the others: one was killed or is out of reach. {reason}\n"
        "What is finished is saved; the same command goes on from here."
    )
