"""A model that cannot be computed with is refused, with the name of the tensor and the numbers."""

from typing import Any

import pytest
import torch
from torch import nn

from casp_pl.errors import InputError, NumericsError
from casp_pl.models import ModelAdapter
from casp_pl.models.soundness import require_finite_weights
from casp_pl.modules import EndToEndModule

NAN = float("nan")


def test_a_whole_model_passes_as_it_is(model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    require_finite_weights(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("value", [NAN, float("-inf")])
def test_broken_weights_are_named_and_counted(model: Any, value: float) -> None:
    layers = model.model.language_model.layers
    layers[1].mlp.up_proj.weight[3, 5:7] = value
    layers[1].mlp.down_proj.weight[0, 0] = value
    name = r"model\.language_model\.layers\.1\.mlp\.up_proj\.weight"
    with pytest.raises(NumericsError, match=rf"{name}: 2 of 4608 weights .*2 such tensors"):
        require_finite_weights(model)


def test_a_tensor_on_meta_is_named(model: Any) -> None:
    model.model.language_model.layers[0].self_attn.o_proj = nn.Linear(64, 48, bias=False, device="meta")
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.o_proj\.weight was never filled.*1 tensors"):
        require_finite_weights(model)


def test_nothing_is_trained_end_to_end_with_a_tensor_on_meta(adapter: ModelAdapter) -> None:
    adapter.blocks[1].mlp.up_proj = nn.Linear(48, 96, bias=False, device="meta")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight was never filled"):
        EndToEndModule(adapter, {}).configure_model()


def test_integers_are_never_broken() -> None:
    module = nn.Module()
    module.register_buffer("codes", torch.arange(5, dtype=torch.uint8))
    require_finite_weights(module)
    module.register_buffer("scale", torch.tensor(NAN))
    with pytest.raises(NumericsError, match="scale: 1 of 1"):
        require_finite_weights(module)
