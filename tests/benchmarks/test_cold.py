"""Benchmarks time quantizers cold: what these keep of a second moment is made anew in every timed run."""

import pytest
import torch

from benchmarks import growth
from benchmarks.aqlm import random_case
from benchmarks.cold import cold_median, with_fresh_moments
from casp_pl.quantizers import AQLMQuantizer, GPTQQuantizer, aqlm, gptq

QUANTIZERS = {
    "gptq": lambda: GPTQQuantizer(group_size=16),
    "aqlm": lambda: AQLMQuantizer(formats={2: [[4, 16, 8]]}, max_rounds=1),
}


@pytest.fixture
def factorisations(monkeypatch):
    """The moments that were factorised, in order."""
    seen = []
    for module, name in ((gptq, "ordered_feedback"), (aqlm, "_make_feedback")):
        make = getattr(module, name)
        monkeypatch.setattr(module, name, lambda moment, *rest, make=make: seen.append(moment) or make(moment, *rest))
    return seen


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_repeat_factorises(name, factorisations):
    quantizer, (weight, moment) = QUANTIZERS[name](), random_case(32, 32)
    quantizer.quantize(weight, moment, bits=2)
    layer, seconds = cold_median(quantizer, weight, moment, repeats=3)
    assert len(factorisations) == 4
    assert layer.dequantize().equal(quantizer.quantize(weight, moment, bits=2).dequantize())
    assert seconds > 0


def test_growth_times_five_cold_runs(factorisations, monkeypatch, capsys):
    monkeypatch.setattr(growth, "QUANTIZERS", {"GPTQ": QUANTIZERS["gptq"]()})
    costs = growth.quantization_costs(256, "rows")
    assert [len(moment) for moment in factorisations] == [64] + 5 * [256]
    assert costs["GPTQ"][256] > 0
    assert capsys.readouterr().out.splitlines()[:2] == ["| rows | GPTQ |", "|---|---|"]


def test_matrices_share_copies_as_they_share_moments():
    (weight, moment), (other, own) = random_case(8, 8), random_case(16, 8)
    copies = with_fresh_moments([(weight, moment), (other, own), (other, moment)])
    assert [pair[0] is each for pair, each in zip(copies, (weight, other, other), strict=True)] == 3 * [True]
    assert copies[0][1] is copies[2][1]
    assert copies[0][1] is not moment
    assert copies[0][1] is not copies[1][1]
    assert torch.equal(copies[1][1], own)
