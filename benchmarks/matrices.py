"""Real matrices for the benchmarks: linears of SmolLM2-135M with the second moments of what they read."""

import pydoc_data.topics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from casp_pl.models import adapt
from casp_pl.models.demo.language import load_language_model, load_tokenizer

__all__ = ["WINDOW", "real_matrices"]

WINDOW = 512


@torch.inference_mode()
def real_matrices(blocks: Sequence[int], tokens: int) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """(block, linear) -> weight (O, I) and mean second moment of its inputs (I, I), on Python's own documentation.

    Args:
        blocks: numbers of decoder blocks; all seven linears of each.
        tokens: that the moments are the mean over, a multiple of `WINDOW`.
    """
    adapter, tokenizer = adapt(load_language_model()), load_tokenizer()
    prose = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    windows = tokenizer(prose, return_tensors="pt").input_ids[0, :tokens].view(-1, WINDOW)
    moments: dict[tuple[int, str], Tensor] = {}

    def watch(place: tuple[int, str]) -> Callable[[object, tuple[Tensor, ...]], None]:
        def hook(_: object, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, 1)
            moments[place] = moments.get(place, torch.zeros(())) + x.T @ x / tokens

        return hook

    for block in blocks:
        for name in adapter.group_heads:
            adapter.blocks[block].get_submodule(name).register_forward_pre_hook(watch((block, name)))
    for window in windows:
        adapter.decoder(window[None])
    return {
        (block, name): (
            adapter.blocks[block].get_parameter(f"{name}.weight").detach().clone(),
            moments[block, group[0]],
        )
        for block in blocks
        for group in adapter.linear_groups
        for name in group
    }
