"""torch.compile of compressed blocks: the same loss and gradients, nothing left behind."""

import pytest
import torch
from torch import Tensor

from casp_pl.models import adapt, load_model
from casp_pl.models.compress import round_to_nearest
from casp_pl.modules.checkpointing import checkpointed
from casp_pl.modules.compiling import CompiledBlocks
from casp_pl.quantizers import RTNQuantizer


def _step(backend: str | None, *, checkpointing: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of a tiny compressed model."""
    adapter = adapt(load_model("tiny")[0])
    blocks = list(round_to_nearest(adapter, RTNQuantizer(group_size=16), 4))
    ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    with adapter.with_blocks(blocks):
        adapter.blocks.requires_grad_(True)
        forward = adapter.model.model
        if backend is None:
            output = forward(input_ids=ids, use_cache=False).last_hidden_state
        else:
            calls = CompiledBlocks(adapter.blocks, backend)
            with calls.active(), checkpointed(adapter.blocks if checkpointing else []):
                output = forward(input_ids=ids, use_cache=False).last_hidden_state
        output.square().mean().backward()
        gradients = [p.grad.clone() for p in adapter.blocks.parameters() if p.grad is not None]
        assert all("forward" not in vars(module) for module in adapter.blocks.modules()), "modules are as they were"
    return output.detach(), gradients


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at its own intermediates
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_same_output_and_gradients(checkpointing: bool) -> None:
    output, gradients = _step(None)
    same, also = _step("eager", checkpointing=checkpointing)  # inductor differs behind what is tested here
    torch.testing.assert_close(same, output, rtol=1e-5, atol=1e-6)
    assert len(gradients) == len(also) > 0
    for left, right in zip(gradients, also, strict=True):
        torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-6)
