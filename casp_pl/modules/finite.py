"""Samples on which the original model itself breaks down: activations that are NaN or infinite."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from casp_pl.errors import NumericsError
from casp_pl.models.activations import Keep, in_memory
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.branches import is_counted, real_tokens
from casp_pl.modules.end_to_end import original_states

__all__ = ["MAX_BROKEN_SHARE", "broken_samples", "refuse_too_many_broken"]

MAX_BROKEN_SHARE = 0.01


@torch.no_grad()
def broken_samples(
    adapter: ModelAdapter,
    batches: Iterable[dict[str, Any]],
    keep: Keep = in_memory,
) -> set[str]:
    """Ids of the samples of this process whose final hidden states are not all finite.

    What breaks in a block stays broken: NaN and infinity go through the residual stream and the final norm.

    Args:
        adapter: the original model.
        batches: those of this process.
        keep: keeps what the batches are between blocks.
    """
    counted = [batch for batch in batches if is_counted(batch)]
    states = original_states(adapter, counted, keep)
    return set().union(*(_broken_rows(hidden, batch) for hidden, batch in zip(states, counted, strict=True)))


def refuse_too_many_broken(broken: Sequence[str], total: int) -> None:
    """More than 1 % of `total` samples is an error.

    Raises:
        NumericsError: with both counts and the first sample.
    """
    if len(broken) > MAX_BROKEN_SHARE * total:
        raise NumericsError(
            f"{len(broken)} of {total} samples give NaN or infinite activations (more than {MAX_BROKEN_SHARE:.0%}).\n"
            f"The first is {broken[0]}. Where model.dtype is float16, bfloat16 or float32 has the range."
        )


def _broken_rows(hidden: Tensor, batch: dict[str, Any]) -> set[str]:
    """Ids of a batch's samples with a broken value at a real token of hidden (B, T, I)."""
    broken = (~hidden.isfinite().all(-1) & real_tokens(batch)).any(-1)
    return {sample for sample, row in zip(batch["sample_ids"], broken.tolist(), strict=True) if row}
