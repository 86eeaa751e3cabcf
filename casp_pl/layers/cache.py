"""A value computed from codes, kept until the codes change."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["CodesCache"]

_Value = TypeVar("_Value")


class CodesCache(Generic[_Value]):
    """Remembers one value together with the state of the tensors that it came from.

    Writing into a tensor (`load_state_dict` does), replacing it or moving it makes the value stale, so no caller has
    to remember to invalidate. It is deliberately no buffer: not in the state_dict, not broadcast, never on the meta
    device.
    """

    def __init__(self) -> None:
        self._sources: tuple[Tensor, ...] = ()
        self._versions: tuple[int, ...] = ()
        self._value: _Value | None = None

    def get(self, build: Callable[[], _Value], *sources: Tensor) -> _Value:
        """The kept value, or `build()` where one of the sources changed since."""
        versions = tuple(0 if source.is_inference() else source._version for source in sources)
        if self._value is None or versions != self._versions or not self._came_from(sources):
            with torch.inference_mode(False), torch.no_grad():
                self._value = build()
            self._sources, self._versions = sources, versions
        return self._value

    def clear(self) -> None:
        """Forgets the value."""
        self._sources, self._versions, self._value = (), (), None

    def _came_from(self, sources: tuple[Tensor, ...]) -> bool:
        pairs = zip(sources, self._sources, strict=False)
        return len(sources) == len(self._sources) and all(new is old for new, old in pairs)
