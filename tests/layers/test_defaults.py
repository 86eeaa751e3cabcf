"""Layers compute the same whatever torch's default dtype and device are; Lightning's `bf16-true` sets a dtype in steps.

What is made without a dtype gets the default one, and compiled loops write float32 at its address.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from casp_pl.kernels.lattice import LATTICE_STAGES
from casp_pl.layers import AdditiveLinear, LatticeLinear, QuantizedLinear, UniformLinear

ROWS, COLUMNS = 67, 48


DEFAULTS = [torch.bfloat16, torch.float16, torch.float64, torch.device("meta")]


def _codes(limit: int, *shape: int) -> Tensor:
    return torch.randint(limit, shape, generator=torch.Generator().manual_seed(limit))


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))


def _additive(books: int, entries: int, length: int, rows: int = ROWS) -> QuantizedLinear:
    codes, tables = (
        _codes(entries, rows, COLUMNS // length, books),
        (_numbers(books, entries, length), _numbers(rows, 1)),
    )
    return AdditiveLinear.from_codes(codes, *tables, in_features=COLUMNS, bias=_numbers(rows))


def _lattice(bits: int, rows: int = ROWS) -> QuantizedLinear:
    stages = [_codes(1 << 8 * stage.num_bytes, rows, COLUMNS // 8) for stage in LATTICE_STAGES[bits]]
    return LatticeLinear.from_codes(torch.stack(stages), _numbers(COLUMNS), _numbers(rows), bits=bits)


def _uniform(bits: int, group_size: int = 16) -> QuantizedLinear:
    groups = -(-COLUMNS // group_size)
    codes, zeros = _codes(1 << bits, ROWS, COLUMNS), _codes(1 << bits, ROWS, groups)
    return UniformLinear.from_codes(codes, zeros, _numbers(ROWS, groups), bits=bits, group_size=group_size)


LAYERS: dict[str, Callable[[], QuantizedLinear]] = {
    **{f"AQLM {books}x8": lambda k=books: _additive(k, 256, 8) for books in (1, 2, 3, 4)},
    "AQLM 2x6, groups of 4": lambda: _additive(2, 64, 4),
    "AQLM 2x8, 3 rows": lambda: _additive(2, 256, 8, rows=3),
    **{f"E8P {bits}": lambda b=bits: _lattice(b) for bits in LATTICE_STAGES},
    "E8P 3, 3 rows": lambda: _lattice(3, rows=3),
    **{f"GPTQ {bits}": lambda b=bits: _uniform(b) for bits in (2, 3, 4, 5, 8)},
    "GPTQ 3, groups of 7": lambda: _uniform(3, 7),
}


def _results(layer: QuantizedLinear, few: Tensor, many: Tensor) -> list[Tensor]:
    """Outputs of a token and of many, the weight, and gradients."""
    with torch.no_grad():
        results = [layer(few), layer(many), layer.dequantize()]
    trained = layer(many)
    return [*results, trained, *torch.autograd.grad(trained.square().sum(), list(layer.tables().values()))]


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_results_do_not_depend_on_the_defaults(
    name: str, default: torch.dtype | torch.device, under_default: Callable[..., AbstractContextManager[None]]
) -> None:
    few, many = _numbers(1, COLUMNS), _numbers(40, COLUMNS)
    expected, layer = _results(LAYERS[name](), few, many), LAYERS[name]()
    with under_default(default):
        results = _results(layer, few, many)
    for actual, wanted in zip(results, expected, strict=True):
        assert actual.dtype == wanted.dtype
        assert torch.equal(actual, wanted)
