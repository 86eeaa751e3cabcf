"""Moves the bar of the current stage."""

from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl

__all__ = ["Advance"]


class Advance(pl.Callback):
    """Calls `advance` after every batch of one kind of loop.

    Args:
        advance: takes no argument.
        loop: which batches count.
    """

    def __init__(self, advance: Callable[[], None], *, loop: Literal["train", "validation", "test"]) -> None:
        self.advance = advance
        self.loop = loop

    def on_train_batch_end(self, *_: Any) -> None:
        """A training step is done."""
        self._step("train")

    def on_validation_batch_end(self, *_: Any) -> None:
        """A validation batch is done."""
        self._step("validation")

    def on_test_batch_end(self, *_: Any) -> None:
        """A test batch is done."""
        self._step("test")

    def _step(self, loop: str) -> None:
        if loop == self.loop:
            self.advance()
