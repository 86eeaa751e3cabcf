"""A token that is far larger than others counts like a few of them, in every moment that a linear is quantized with."""

from typing import Any

import pytest
import torch
from torch import Tensor

from casp_pl.errors import ConfigError
from casp_pl.models import ModelAdapter
from casp_pl.models.compress import BlockQuantization, collect_moments
from casp_pl.models.streams import first_block_batches, linear_inputs
from casp_pl.models.token_weights import energy_limit, root_weights
from casp_pl.quantizers import GPTQQuantizer

CPU = torch.device("cpu")


def _tokens(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def test_the_limit_is_of_all_batches_together_however_they_are_cut() -> None:
    tokens = _tokens(31, 7).bfloat16()
    tokens[4] = 0
    energies = tokens.double().square().sum(dim=1)
    expected = 3 * energies[energies > 0].log().mean().exp()
    for cuts in ([31], [1, 10, 20], [5, 26]):
        limit = energy_limit(torch.split(tokens, cuts), 3.0, CPU)
        torch.testing.assert_close(limit, expected, rtol=1e-6, atol=0)
    assert energy_limit([tokens], None, CPU).isinf()
    assert energy_limit([torch.zeros(2, 3)], 5.0, CPU) == 5


def test_a_token_is_scaled_by_its_larger_energy_and_others_stay_as_they_are() -> None:
    here, there = _tokens(9, 5), _tokens(9, 5).flip(0)
    here[2] *= 1e3
    there[6] *= 1e6
    here[7] = there[7] = 0
    limit = energy_limit([here], 16.0, CPU)
    roots = root_weights(limit, here, there)
    others = [0, 1, 3, 4, 5, 7, 8]
    assert torch.equal(roots[others], torch.ones(7, 1, dtype=torch.float64))
    for row, large in ((2, here), (6, there)):
        torch.testing.assert_close(roots[row, 0], limit.sqrt() / large[row].double().norm(), rtol=1e-6, atol=0)


def test_moments_of_a_block_with_a_huge_token(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    streams, name = first_block_batches(adapter, batches), "mlp.down_proj"
    block = adapter.blocks[0]
    inputs = [linear_inputs(block, stream, [name])[name] for stream in streams]
    references = [part.clone() for part in inputs]
    references[1][3] *= 100
    moments = collect_moments(block, streams, references, name, 4.0)
    x, seen = torch.cat(references).double(), torch.cat(inputs).double()
    energies = torch.maximum(x.square().sum(dim=1), seen.square().sum(dim=1))
    weights = (4 * x.square().sum(dim=1).log().mean().exp() / energies).clamp(max=1)
    assert weights.min() < 0.01
    for moment, left in ((moments.second, seen), (moments.cross, x)):
        expected = (left * weights[:, None]).T @ seen / len(seen)
        torch.testing.assert_close(moment.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_moments_of_what_a_linear_reads_alone(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    """Where the original is not asked, what is typical is seen here, and what was seen stays as it is."""
    streams, name = first_block_batches(adapter, batches), "mlp.down_proj"
    block, kept = adapter.blocks[0], []
    moments = collect_moments(block, streams, None, name, 0.7, lambda inputs: kept.append(inputs) or inputs)
    seen = [linear_inputs(block, stream, [name])[name] for stream in streams]
    assert all(torch.equal(one, other) for one, other in zip(kept, seen, strict=True))
    x = torch.cat(seen).double()
    energies = x.square().sum(dim=1)
    weights = (0.7 * energies.log().mean().exp() / energies).clamp(max=1)
    assert (weights < 0.9).any()
    assert (weights == 1).any()
    expected = (x * weights[:, None]).T @ x / len(x)
    torch.testing.assert_close(moments.second.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert moments.cross is None


def test_a_huge_token_no_longer_spoils_the_others() -> None:
    tokens, weight = _tokens(400, 48), _tokens(20, 48)
    tokens[0] = 1e3 * torch.sign(tokens[0])
    errors = []
    for times in (None, 16.0):
        counted = tokens * root_weights(energy_limit([tokens], times, CPU), tokens).float()
        layer = GPTQQuantizer(group_size=16).quantize(weight, counted.T @ counted, bits=2)
        errors.append(float((tokens[1:] @ (layer.dequantize().detach() - weight).T).square().mean()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_of_nothing_is_refused(limit: float) -> None:
    with pytest.raises(ConfigError, match=r"quantization\.token_limit must be above 0, or null"):
        BlockQuantization(token_limit=limit)
