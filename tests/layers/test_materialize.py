"""Dense weights for a while."""

import pytest
import torch
from torch import nn

from casp_pl.layers import AdditiveLinear, LowRankLinear, UniformLinear, materialized


def _model() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (6, 2, 2), generator=generator)
    tables = torch.randn(2, 8, 8, generator=generator), torch.rand(6, 1, generator=generator)
    additive = AdditiveLinear.from_codes(codes, *tables, in_features=13)
    grid = torch.randint(0, 8, (5, 6), generator=generator), torch.zeros(5, 1), torch.rand(5, 1, generator=generator)
    uniform = UniformLinear.from_codes(*grid, bits=3, group_size=8)
    return nn.Sequential(LowRankLinear(input_factor=additive, output_factor=uniform), nn.Linear(5, 2))


def test_outputs_are_the_same_inside_and_weights_are_kept() -> None:
    model = _model()
    x = torch.randn(4, 13, generator=torch.Generator().manual_seed(1), requires_grad=True)
    before = model(x)
    (slope,) = torch.autograd.grad(before.sum(), x)
    factor = model[0].input_factor
    with materialized(model):
        assert torch.equal(model(x), before)
        (inside,) = torch.autograd.grad(model(x).sum(), x)
        with torch.no_grad():
            factor.scales.zero_()
        assert torch.equal(model(x), before)  # the dense copy is what computes
    torch.testing.assert_close(inside, slope)
    assert not factor.is_materialized
    assert not model(x).allclose(before)


def test_it_frees_on_errors_and_nests() -> None:
    model = _model()
    with pytest.raises(KeyError), materialized(model):
        raise KeyError
    factor = model[0].output_factor
    assert not factor.is_materialized
    with materialized(model):
        with materialized(model):
            pass
        assert factor.is_materialized


def test_new_codes_inside_are_seen() -> None:
    model = _model()
    factor = model[0].input_factor
    with materialized(model):
        before = model(torch.ones(1, 13))
        factor.set_codes((factor.codes_unpacked() + 1) % 8)
        assert not torch.equal(model(torch.ones(1, 13)), before)


def test_a_dense_weight_made_in_inference_mode_serves_a_backward_pass() -> None:
    model = _model()
    x = torch.ones(1, 13, requires_grad=True)
    with torch.inference_mode():
        context = materialized(model)
        context.__enter__()
    model(x).sum().backward()
    context.__exit__(None, None, None)
    assert x.grad is not None


def test_the_state_is_the_same_inside() -> None:
    model = _model()
    names = set(model.state_dict())
    with materialized(model):
        assert set(model.state_dict()) == names


def test_the_copy_is_no_wider_than_what_the_model_computes_in() -> None:
    model = _model()[0]
    factor = model.input_factor
    with materialized(model):
        assert factor._dense is None, "all weights of a model in float32 would be twice what it needs"
        model(torch.ones(1, 13, dtype=torch.bfloat16))
        assert factor._dense.dtype == torch.bfloat16
        assert torch.equal(factor._dense, factor.dequantize().bfloat16())
