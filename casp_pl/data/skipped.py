"""Samples left out, each with its reason; too many of them end the run."""

from collections.abc import Sequence
from dataclasses import dataclass

from casp_pl.errors import InputError

__all__ = ["MAX_SKIPPED_SHARE", "Skipped", "refuse_too_many_skipped"]

MAX_SKIPPED_SHARE = 0.05


@dataclass(frozen=True)
class Skipped:
    """A sample that did not enter, and why."""

    id: str
    reason: str


def refuse_too_many_skipped(skipped: Sequence[Skipped], total: int) -> None:
    """More than 5 % of `total` left out is an error.

    Raises:
        InputError: with both counts and the first two samples left out.
    """
    if len(skipped) > MAX_SKIPPED_SHARE * total:
        named = zip(("first", "next"), skipped, strict=False)
        raise InputError(
            f"{len(skipped)} of {total} samples cannot be used (more than {MAX_SKIPPED_SHARE:.0%})\n"
            + "\n".join(f"The {place} is {sample.id}: {sample.reason}" for place, sample in named)
        )
