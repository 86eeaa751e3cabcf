"""What linears that read the same input share: everything that is made of their second moment alone."""

import weakref
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

__all__ = ["MadeOfMoment"]

T = TypeVar("T")


class _Made(NamedTuple, Generic[T]):
    moment: weakref.ref[Tensor]
    state: Hashable
    value: T


class MadeOfMoment(Generic[T]):
    """Keeps what was last made of each second moment, as long as that tensor lives and is not changed.

    W_q, W_k and W_v read one input, and so do W_gate and W_up: their second moment, one tensor, is factorised once. A
    low-rank W_q is two matrices, and the outer one reads another input: its moment comes between and goes again.
    """

    def __init__(self) -> None:
        self._kept: dict[int, _Made[T]] = {}

    def get(self, moment: Tensor, settings: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned for this tensor and these settings, or returns now.

        Of a tensor made in inference mode, which does not count its changes, nothing is kept.

        Args:
            moment: (I, I).
            settings: everything else that the result depends on.
            make: takes no argument.
        """
        if moment.is_inference():
            return make()
        key, state = id(moment), (moment._version, settings)
        found = self._kept.get(key)
        if found is None or found.moment() is not moment or found.state != state:
            self._kept.pop(key, None)  # two of one moment at a time would be one too many
            del found
            reference = weakref.ref(moment, lambda gone: self._forget(key, gone))
            found = self._kept[key] = _Made(reference, state, make())
        return found.value

    def _forget(self, key: int, gone: weakref.ref[Tensor]) -> None:
        if key in self._kept and self._kept[key].moment is gone:
            del self._kept[key]
