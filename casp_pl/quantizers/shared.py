"""What linears that read the same input share: everything that is made of their second moment alone."""

import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import Tensor

__all__ = ["MadeOfMoment"]

T = TypeVar("T")


class MadeOfMoment(Generic[T]):
    """Keeps what was last made of a second moment, as long as that tensor lives and is not changed.

    W_q, W_k and W_v read one input, and so do W_gate and W_up: their second moment, one tensor, is factorised once.
    """

    def __init__(self) -> None:
        self._kept: tuple[weakref.ref[Tensor], Hashable, T] | None = None

    def get(self, moment: Tensor, settings: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned for this tensor and these settings, or returns now.

        Args:
            moment: (I, I).
            settings: everything else that the result depends on.
            make: takes no argument.
        """
        state = (None if moment.is_inference() else moment._version, settings)
        if self._kept is None or self._kept[0]() is not moment or self._kept[1] != state:
            self._kept = None  # two at a time would be one too many
            self._kept = (weakref.ref(moment, self._forget), state, make())
        return self._kept[2]

    def _forget(self, _: object) -> None:
        self._kept = None
