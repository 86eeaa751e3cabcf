"""Linears that read one input share its factorisation, and get what they would have got alone."""

import weakref

import pytest
import torch
from torch import Tensor

from casp_pl.linalg import cholesky
from casp_pl.quantizers import AQLMQuantizer, GPTQQuantizer, Quantizer, QuIPSharpQuantizer, quip
from casp_pl.quantizers.shared import MadeOfMoment


def _moment(width: int) -> Tensor:
    inputs = torch.randn(3 * width, width, generator=torch.Generator().manual_seed(width))
    return inputs.T @ inputs


@pytest.mark.parametrize("kind", [AQLMQuantizer, GPTQQuantizer])
def test_two_weights_of_one_input_factorise_it_once(kind: type[Quantizer], monkeypatch: pytest.MonkeyPatch) -> None:
    moment, quantizer = _moment(22), kind()
    weights = [torch.randn(rows, 22, generator=torch.Generator().manual_seed(rows)) for rows in (9, 5)]
    alone = [kind().quantize(weight, moment, bits=2).dequantize() for weight in weights]
    calls = []
    real = torch.linalg.cholesky_ex
    monkeypatch.setattr(cholesky.torch.linalg, "cholesky_ex", lambda *a, **k: calls.append(1) or real(*a, **k))
    together = [quantizer.quantize(weight, moment, bits=2).dequantize() for weight in weights]
    assert len(calls) == 1
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("kind", [AQLMQuantizer, GPTQQuantizer])
def test_the_input_between_two_low_rank_factors_does_not_get_in_the_way(
    kind: type[Quantizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    moment, quantizer = _moment(24), kind()
    calls = []
    real = torch.linalg.cholesky_ex
    monkeypatch.setattr(cholesky.torch.linalg, "cholesky_ex", lambda a, **k: calls.append(len(a)) or real(a, **k))
    for seed in range(2):  # W_q and W_k, of rank 8 each, then W_v
        generator = torch.Generator().manual_seed(seed)
        inner = quantizer.quantize(torch.randn(8, 24, generator=generator), moment, bits=2).dequantize()
        quantizer.quantize(torch.randn(24, 8, generator=generator), inner @ moment @ inner.T, bits=2)
    quantizer.quantize(torch.randn(24, 24), moment, bits=2)
    assert calls.count(24) == 1
    assert calls.count(8) == 2


@pytest.mark.parametrize(("widest", "made"), [(8192, 1), (16, 2)])
def test_lattice_codes_of_one_input_share_signs_and_factor(
    widest: int, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment, calls = _moment(22), []
    weights = [torch.randn(rows, 22, generator=torch.Generator().manual_seed(rows)) for rows in (9, 5)]
    alone = [QuIPSharpQuantizer().quantize(weight, moment, bits=2).dequantize() for weight in weights]
    real = quip.prepare_moment
    monkeypatch.setattr(quip, "_WIDEST_SHARED", widest)
    monkeypatch.setattr(quip, "prepare_moment", lambda *a: calls.append(1) or real(*a))
    quantizer = QuIPSharpQuantizer()
    together = [quantizer.quantize(weight, moment, bits=2).dequantize() for weight in weights]
    assert len(calls) == made
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_another_tensor_a_change_and_other_settings_are_noticed() -> None:
    kept, moment, made = MadeOfMoment[int](), _moment(3), iter(range(9))
    assert [kept.get(moment, "a", lambda: next(made)) for _ in range(2)] == [0, 0]
    assert kept.get(moment.clone(), "a", lambda: next(made)) == 1, "equal values are not enough"
    assert kept.get(moment, "a", lambda: next(made)) == 0
    assert kept.get(moment, "b", lambda: next(made)) == 2
    moment.mul_(2)
    assert kept.get(moment, "b", lambda: next(made)) == 3


def test_a_change_in_inference_mode_is_noticed() -> None:
    quantizer, weight = GPTQQuantizer(group_size=8), torch.randn(5, 24)
    with torch.inference_mode():
        moment = _moment(24).clone()
        quantizer.quantize(weight, moment, bits=2)
        moment.zero_().add_(_moment(24).flip(0).flip(1))
        again = quantizer.quantize(weight, moment, bits=2).dequantize()
    fresh = GPTQQuantizer(group_size=8).quantize(weight, _moment(24).flip(0).flip(1), bits=2).dequantize()
    assert torch.equal(again, fresh)


def test_nothing_is_kept_longer_than_the_moment() -> None:
    kept, moment = MadeOfMoment[Tensor](), _moment(3)
    made = weakref.ref(kept.get(moment, None, lambda: torch.ones(2)))
    assert made() is not None
    del moment
    assert made() is None
