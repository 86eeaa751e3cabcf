"""Next-token figures on windows of text.

Shapes: B windows, T tokens of a window, N positions of a chunk, V vocabulary, E hidden size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["chunked_logits", "predicting_hidden"]


@torch.no_grad()
def predicting_hidden(model: Any, input_ids: Tensor) -> Tensor:
    """(B, T) tokens -> (B, T - 1, E): hidden states after the final norm that predict tokens 1 to T - 1."""
    output = model.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
    hidden: Tensor = output.last_hidden_state[:, :-1]
    return hidden


@torch.no_grad()
def chunked_logits(head: nn.Module, *hidden: Tensor, chunk: int) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Logits (N, V) of stacks of hidden states (..., E), `chunk` positions at a time, and which positions they are."""
    flat = [states.flatten(0, -2) for states in hidden]
    for start in range(0, len(flat[0]), chunk):
        rows = slice(start, start + chunk)
        yield rows, tuple(head(states[rows]) for states in flat)
