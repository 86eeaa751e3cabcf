"""Activation checkpointing: the same gradients, fewer tensors kept."""

import torch
from torch import Tensor

from casp_pl.models import adapt, load_model
from casp_pl.modules.checkpointing import checkpointed


def _step(checkpointing: bool) -> tuple[Tensor, list[Tensor], int]:
    """Output and gradients of a tiny model, and how many numbers its forward pass keeps."""
    adapter = adapt(load_model("tiny")[0])
    adapter.blocks.requires_grad_(True)
    ids, kept = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(1)), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with checkpointed(adapter.blocks if checkpointing else []):
            output = adapter.model(input_ids=ids, use_cache=False).logits
        output.square().mean().backward()
    gradients = [p.grad.clone() for p in adapter.blocks.parameters() if p.grad is not None]
    assert all("forward" not in vars(block) for block in adapter.blocks), "blocks are as they were"
    return output.detach(), gradients, sum(kept)


def test_gradients_are_the_same_and_less_is_kept() -> None:
    (output, gradients, kept), (same, also, fewer) = _step(False), _step(True)
    assert torch.equal(output, same)
    assert len(gradients) == len(also) > 0
    assert all(torch.equal(*pair) for pair in zip(gradients, also, strict=True))
    assert fewer < kept / 2
