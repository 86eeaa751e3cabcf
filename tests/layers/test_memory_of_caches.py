"""A compressed layer stays small when it is used: nothing that is kept is much larger than the codes."""

import gc
import types
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from casp_pl.kernels.lattice import LATTICE_STAGES
from casp_pl.kernels.packing import pack_wide
from casp_pl.layers import AdditiveLinear, LatticeLinear, QuantizedLinear, UniformLinear

ROWS, COLUMNS = 128, 512
KEPT = (dict, list, tuple, partial, types.MethodType, torch.nn.Module)


def _additive() -> QuantizedLinear:
    return AdditiveLinear(in_features=COLUMNS, out_features=ROWS, num_codebooks=2)


def _lattice(bits: int) -> Callable[[], QuantizedLinear]:
    return lambda: LatticeLinear(in_features=COLUMNS, out_features=ROWS, bits=bits)


def _uniform(bits: int, regrouped: bool) -> Callable[[], QuantizedLinear]:
    def make() -> QuantizedLinear:
        layer = UniformLinear(in_features=COLUMNS, out_features=ROWS, bits=bits, regrouped=regrouped)
        if layer.column_groups is not None:
            layer.column_groups.copy_(pack_wide(torch.arange(COLUMNS).flip(0) // 64, 3))
        return layer

    return make


KINDS = ("runs", "regrouped")
LAYERS = {
    "additive": _additive,
    **{f"lattice {bits}": _lattice(bits) for bits in LATTICE_STAGES},
    **{f"uniform {bits} {kind}": _uniform(bits, kind == "regrouped") for bits in (2, 4, 8) for kind in KINDS},
}  # fmt: skip


def _held_bytes(layer: QuantizedLinear) -> int:
    """Of all tensors that can be reached from a layer, whatever keeps them."""
    seen: dict[int, object] = {}
    waiting: list[object] = [layer.__dict__]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, types.FunctionType):  # its globals are no part of the layer
            waiting += [cell.cell_contents for cell in item.__closure__ or ()]
        elif isinstance(item, KEPT) or type(item).__module__.startswith("casp_pl"):
            waiting += [other for other in gc.get_referents(item) if not isinstance(other, type)]
    storages = {
        item.untyped_storage().data_ptr(): item.untyped_storage().nbytes()
        for item in seen.values()
        if isinstance(item, Tensor)
    }
    return sum(storages.values())


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("name", LAYERS)
def test_what_products_leave_is_as_large_as_the_codes(name: str, tokens: int) -> None:
    layer = LAYERS[name]()
    before = _held_bytes(layer)
    assert before >= layer.codes.nbytes
    with torch.no_grad():
        layer(torch.randn(tokens, COLUMNS))
    # two layouts of the codes at most, zero points, and scales turned: never a byte or more for a weight of 2 bits
    assert _held_bytes(layer) - before <= 2.6 * layer.codes.nbytes + 2 * layer.out_features * 8 * 4
    layer.free_cache()
    assert _held_bytes(layer) == before


@pytest.mark.parametrize("name", LAYERS)
def test_a_training_step_leaves_no_more(name: str) -> None:
    layer = LAYERS[name]()
    before = _held_bytes(layer)
    layer(torch.randn(4, COLUMNS, requires_grad=True)).square().sum().backward()
    gradients = sum(parameter.grad.nbytes for parameter in layer.parameters() if parameter.grad is not None)
    assert _held_bytes(layer) - before - gradients <= 2.6 * layer.codes.nbytes
