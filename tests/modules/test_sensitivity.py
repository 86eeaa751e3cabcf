"""Sensitivities against what they predict: the KL divergence that errors really cause, and what rounding leaves."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from casp_pl.data import CalibrationData
from casp_pl.models import adapt, load_model
from casp_pl.models.adapter import ModelAdapter
from casp_pl.modules.end_to_end import final_states, target_mask
from casp_pl.modules.sensitivity import linear_sensitivities


@pytest.fixture(scope="module")
def tiny() -> tuple[ModelAdapter, list[dict[str, Any]]]:
    model, processor = load_model("tiny")
    data = CalibrationData(samples=16, text_ratio=1.0, text_length=48, batch_size=7)
    data.attach(processor)
    return adapt(model), list(data.calibration_dataloader())


def _log_probabilities(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> Iterator[torch.Tensor]:
    with torch.no_grad():
        for batch in batches:
            yield adapter.head(final_states(adapter, batch)[target_mask(batch)]).double().log_softmax(-1)


@pytest.mark.parametrize("name", ["self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
@pytest.mark.parametrize("block", [0, 1])
def test_scores_predict_the_divergence_of_small_errors(
    block: int, name: str, tiny: tuple[ModelAdapter, list[dict[str, Any]]]
) -> None:
    """Errors as feedback shapes them: their KL is the score times the noise."""
    adapter, batches = tiny
    score = linear_sensitivities(adapter, batches, seed=0)[adapter.full_name(block, name)]
    linear = adapter.blocks[block].get_submodule(name)
    seen: list[torch.Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1).double()))
    before = list(_log_probabilities(adapter, batches))
    handle.remove()
    x = torch.cat(seen)
    moment = x.T @ x / len(x)
    factor = torch.linalg.cholesky(moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment)))
    shape = torch.linalg.inv(factor / factor.diagonal())
    generator, weight = torch.Generator().manual_seed(0), linear.weight.data.clone()
    size, measured, draws = 0.02 * float(weight.square().mean().sqrt()), 0.0, 12
    for _ in range(draws):
        errors = size * torch.randn(weight.shape, generator=generator, dtype=torch.float64) @ shape
        linear.weight.data = weight + errors.float()
        after = _log_probabilities(adapter, batches)
        kls = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(before, after, strict=True)]
        measured += float(sum(kls)) / len(kls) / draws
    linear.weight.data = weight
    assert score * 0.02**2 == pytest.approx(measured, rel=0.35)


def test_nothing_of_the_model_is_changed(tiny: tuple[ModelAdapter, list[dict[str, Any]]]) -> None:
    adapter, batches = tiny
    before = [parameter.requires_grad for parameter in adapter.model.parameters()]
    scores = linear_sensitivities(adapter, batches, seed=0)
    assert [parameter.requires_grad for parameter in adapter.model.parameters()] == before
    assert all(parameter.grad is None for parameter in adapter.model.parameters())
    assert not any(block._forward_pre_hooks for block in adapter.blocks)
    assert set(scores) == {adapter.full_name(b, n) for b in range(len(adapter.blocks)) for n in adapter.linear_names}
    assert all(score > 0 for score in scores.values())
    assert scores == linear_sensitivities(adapter, batches, seed=0)
