"""Layers of every kind have no race: 400 calls with two threads give the same bits, of few tokens and of many.

Of one thread they differ by roundings, where a BLAS multiplies too: with a rebuilt weight, in the transforms of QuIP#
and with the zero points of GPTQ. AQLM's few tokens do without, and are the same to the bit.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from casp_pl.kernels.lattice import LATTICE_STAGES
from casp_pl.layers import AdditiveLinear, LatticeLinear, QuantizedLinear, UniformLinear

ROWS, COLUMNS = 203, 72
ROUNDING = 1e-6


def _codes(limit: int, *shape: int) -> Tensor:
    return torch.randint(limit, shape, generator=torch.Generator().manual_seed(limit))


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))


def _additive(books: int) -> QuantizedLinear:
    codes, tables = _codes(256, ROWS, COLUMNS // 8, books), (_numbers(books, 256, 8), _numbers(ROWS, 1))
    return AdditiveLinear.from_codes(codes, *tables, in_features=COLUMNS, bias=_numbers(ROWS))


def _lattice(bits: int) -> QuantizedLinear:
    stages = [_codes(1 << 8 * stage.num_bytes, ROWS, COLUMNS // 8) for stage in LATTICE_STAGES[bits]]
    return LatticeLinear.from_codes(torch.stack(stages), _numbers(COLUMNS), _numbers(ROWS), bits=bits)


def _uniform(bits: int) -> QuantizedLinear:
    codes, zeros = _codes(1 << bits, ROWS, COLUMNS), _codes(1 << bits, ROWS, 3)
    groups = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(bits)) // 24
    return UniformLinear.from_codes(codes, zeros, _numbers(ROWS, 3), bits=bits, group_size=24, column_groups=groups)


LAYERS: dict[str, Callable[[], QuantizedLinear]] = {
    **{f"AQLM {books}x8": lambda k=books: _additive(k) for books in (1, 2, 3, 4)},
    **{f"E8P {bits}": lambda b=bits: _lattice(b) for bits in LATTICE_STAGES},
    **{f"GPTQ {bits}": lambda b=bits: _uniform(b) for bits in (2, 3, 4, 8)},
}


@pytest.mark.parametrize("name", LAYERS)
def test_few_tokens(name: str, assert_race_free: Callable[..., None]) -> None:
    layer, x = LAYERS[name](), _numbers(5, COLUMNS)
    with torch.no_grad():
        assert_race_free(lambda: (layer(x[:1]), layer(x)), 0 if "AQLM" in name else ROUNDING)


@pytest.mark.parametrize("name", LAYERS)
def test_many_tokens(name: str, assert_race_free: Callable[..., None]) -> None:
    layer, x = LAYERS[name](), _numbers(35, COLUMNS)
    with torch.no_grad():
        assert_race_free(lambda: (layer(x),), ROUNDING)


@pytest.mark.parametrize("name", LAYERS)
def test_the_weight_and_its_gradients(name: str, assert_race_free: Callable[..., None]) -> None:
    layer, pull = LAYERS[name](), _numbers(ROWS, COLUMNS)
    tables = list(layer.tables().values())

    def compute() -> tuple[Tensor, ...]:
        weight = layer.dequantize()
        return weight.detach(), *torch.autograd.grad(weight, tables, pull)

    assert_race_free(compute, ROUNDING if "E8P" in name else 0)
