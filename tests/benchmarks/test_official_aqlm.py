"""The released AQLM procedure as the baseline runs it."""

import random

import pytest
import torch

from benchmarks.aqlm import random_case
from benchmarks.official_aqlm import _decode, _row_losses, _search, official_aqlm
from casp_pl.linalg.losses import relative_proxy_loss


def test_it_ends_by_itself_or_when_no_more_rounds_are_allowed():
    weight, moment = random_case(96, 64)
    whole, first = official_aqlm(weight, moment), official_aqlm(weight, moment, rounds=1)
    assert (first.rounds, first.ended) == (1, False)
    assert whole.ended
    assert 1 < whole.rounds < 20
    assert relative_proxy_loss(weight, whole.weight, moment) < 0.9 * relative_proxy_loss(weight, first.weight, moment)


def test_a_search_takes_the_best_entry_of_every_code():
    """Against all 256 candidates, each decoded and multiplied in full, where there is one group only."""
    generator = torch.Generator().manual_seed(0)
    weight, scales = torch.randn(5, 8, generator=generator), torch.rand(5, 1, generator=generator) + 0.5
    inputs, codebooks = torch.randn(32, 8, generator=generator), torch.randn(2, 256, 8, generator=generator)
    moment, codes = inputs.T @ inputs / 32, torch.randint(0, 256, (5, 1, 2), generator=generator)
    order = random.Random(0)
    found = _search(weight, moment, codes, codebooks, scales, order)
    turns = list(range(2))
    again = random.Random(0)
    again.shuffle([0])
    again.shuffle(turns)
    expected = codes.clone()
    for k in turns:
        candidates = torch.stack([expected] * 256)
        candidates[..., k] = torch.arange(256)[:, None, None]
        losses = [_row_losses(weight, moment, _decode(each, codebooks, scales)) for each in candidates]
        expected[:, 0, k] = torch.stack(losses).argmin(dim=0)
    assert found.equal(expected)


def test_decoding_adds_the_entries_of_all_codebooks():
    codes, codebooks = torch.tensor([[[1, 2], [0, 255]]]), torch.randn(2, 256, 8)
    rows = torch.cat([codebooks[0, 1] + codebooks[1, 2], codebooks[0, 0] + codebooks[1, 255]])
    assert _decode(codes, codebooks, torch.tensor([[3.0]]))[0].tolist() == pytest.approx((3 * rows).tolist())
