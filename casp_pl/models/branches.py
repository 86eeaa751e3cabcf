"""Which tokens count, and which see which where several questions share one image.

A sample may hold several conversations about the same image. They branch off behind the image: every token sees the
shared start and its own branch, as if each conversation stood alone, but the image is computed once.

Shapes: B batch, T sequence.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from casp_pl.errors import ConfigError

__all__ = ["additive_mask", "is_counted", "real_tokens", "refuse_short_windows", "visible_pairs"]


def is_counted(batch: Mapping[str, Any]) -> bool:
    """False for a batch that only keeps a process busy while the others have one to work on."""
    return bool(batch.get("counted", True))


def real_tokens(batch: Mapping[str, Any]) -> Tensor:
    """(B, T) bool, False at padding, and everywhere in a batch that does not count."""
    real: Tensor = batch["attention_mask"].bool()
    return real if is_counted(batch) else torch.zeros_like(real)


def visible_pairs(batch: Mapping[str, Any], window: int | None = None) -> Tensor:
    """(B, T, T) bool, [b, q, k] is True where token q may look at token k: not behind it, not in another branch.

    Args:
        batch: `input_ids` (B, T) and, where conversations share an image, `branches` (B, T): 0 in the shared start,
            then the number of the conversation, -1 at padding.
        window: how many tokens a token looks back at, itself among them, in blocks with a sliding window. With
            branches it must hold the whole sample, see `refuse_short_windows`.
    """
    length = batch["input_ids"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=batch["input_ids"].device).tril()
    if window is not None:
        causal = causal.triu(1 - window)
    branches = batch.get("branches")
    if branches is None:
        return causal.expand(len(batch["input_ids"]), length, length)
    query, key = branches[:, :, None], branches[:, None, :]
    visible: Tensor = ((key == 0) | (key == query)) & causal
    return visible


def refuse_short_windows(batch: Mapping[str, Any], window: int | None) -> None:
    """A mask of branches is one for all blocks, and behind the image positions do not tell how far apart tokens are.

    Raises:
        ConfigError: the sample is longer than what a block looks back at.
    """
    length = batch["input_ids"].shape[1]
    if "branches" in batch and window is not None and length > window:
        raise ConfigError(
            f"Samples of several questions have up to {length} tokens, the model's sliding window holds {window}.\n"
            "Set data.questions_per_image to 1."
        )


def additive_mask(batch: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """`visible_pairs` as what attention adds to its scores: (B, 1, T, T), 0 or the least number of `dtype`."""
    hidden = ~visible_pairs(batch)[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min)
