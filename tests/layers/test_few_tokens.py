"""Few tokens are looked up, many go by way of the dense weight, and both give the same products. For every layer."""

import pytest
import torch
from torch import Tensor, nn

import casp_pl.kernels.lookup as lookup
from casp_pl.kernels.compiled import lookup_loops
from casp_pl.kernels.lattice import LATTICE_STAGES
from casp_pl.layers import (
    AdditiveLinear,
    LatticeLinear,
    LowRankLinear,
    QuantizedLinear,
    UniformLinear,
    materialized,
    product,
)

SHAPES = [(5, 13), (130, 40), (3, 200)]
KINDS = [
    *(("additive", shape) for shape in [(1, 16, 8), (2, 256, 8), (3, 4, 3)]),
    *(("lattice", (bits,)) for bits in LATTICE_STAGES),
    *(("uniform", (bits, group, regrouped)) for bits, group, regrouped in
      [(1, 8, False), (2, 64, False), (2, 7, True), (3, 16, True), (4, 5, False), (5, 64, True), (8, 16, False)]),
]  # fmt: skip


def _layer(kind: str, settings: tuple[int, ...], shape: tuple[int, int], dtype: torch.dtype) -> QuantizedLinear:
    rows, columns = shape
    generator = torch.Generator().manual_seed(rows)

    def codes(limit: int, *size: int) -> Tensor:
        return torch.randint(0, limit, size, generator=generator)

    def numbers(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    if kind == "additive":
        books, entries, length = settings
        return AdditiveLinear.from_codes(
            codes(entries, rows, -(-columns // length), books), numbers(books, entries, length), numbers(rows, 1),
            in_features=columns, bias=numbers(rows),
        )  # fmt: skip
    if kind == "lattice":
        stages = [codes(1 << 8 * s.num_bytes, rows, -(-columns // 8)) for s in LATTICE_STAGES[settings[0]]]
        vectors = numbers(columns), numbers(rows)
        return LatticeLinear.from_codes(torch.stack(stages), *vectors, bits=settings[0], bias=numbers(rows))
    bits, size, regrouped = settings
    groups, order = -(-columns // size), torch.randperm(columns, generator=generator)
    return UniformLinear.from_codes(
        codes(1 << bits, rows, columns), codes(1 << bits, rows, groups), numbers(rows, groups), bits=bits,
        group_size=size, bias=numbers(rows),
        column_groups=order // size if regrouped else None,
    )  # fmt: skip


@pytest.fixture(params=lookup_loops())
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes look-up use one of the loops, whichever is fastest here."""
    monkeypatch.setattr(lookup, "lookup_loop", lambda _: lookup_loops()[request.param])
    return str(request.param)


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_looked_up_products_are_those_of_the_weight(
    kind: str, settings: tuple[int, ...], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    layer = _layer(kind, settings, shape, dtype)
    reference = _layer(kind, settings, shape, dtype).double()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for lead in [(1,), (1, 6), ()]:
        x = torch.randn(*lead, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.no_grad():
            y = layer(x)
            expected = nn.functional.linear(x.double(), reference.dequantize(), reference.bias)
        assert y.dtype == dtype
        scale = float(expected.abs().max())
        torch.testing.assert_close(y.double() / scale, expected / scale, **tolerance)


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize("large", [False, True])  # whether the weight is rebuilt backwards
@pytest.mark.parametrize("lead", [(0,), (2, 0)])
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_no_tokens_are_what_they_are_to_a_dense_layer(
    kind: str, settings: tuple[int, ...], lead: tuple[int, ...], large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(product, "_LARGE", 0)
    layer = _layer(kind, settings, (130, 40), torch.float32)
    x = torch.empty(*lead, 40, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == nn.Linear(40, 130)(x).shape
    assert x.grad.shape == x.shape
    assert not any(parameter.grad.any() for parameter in layer.parameters())
    with torch.no_grad():
        assert layer(x).shape == y.shape
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).shape == y.shape
        with materialized(layer):
            assert layer(x).shape == y.shape


def test_no_tokens_pass_both_factors_of_a_low_rank_layer() -> None:
    first, second = _layer(*KINDS[3], (130, 40), torch.float32), _layer(*KINDS[6], (5, 130), torch.float32)
    first.bias = None
    with torch.no_grad():
        assert LowRankLinear(input_factor=first, output_factor=second)(torch.empty(2, 0, 40)).shape == (2, 0, 5)


@pytest.mark.parametrize(("kind", "settings"), [KINDS[1], KINDS[3], KINDS[8]])
def test_looked_up_where_nothing_forbids_it(
    kind: str, settings: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = _layer(kind, settings, (5, 13), torch.float32)
    x = torch.randn(1, 13, generator=torch.Generator().manual_seed(1))
    calls: list[int] = []
    output_of = QuantizedLinear.output_of  # only what was looked up, or decoded, passes here
    monkeypatch.setattr(QuantizedLinear, "output_of", lambda *given: calls.append(1) or output_of(*given))
    assert layer(x).requires_grad, "with gradients the tables must be reached"
    with torch.no_grad():
        layer(x.repeat(1000, 1))
        with monkeypatch.context() as without:
            without.setattr(lookup, "lookup_loop", lambda _: None)
            expected = layer(x)
        assert not calls
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        assert calls


@pytest.mark.parametrize(
    ("kind", "settings", "rows", "decoded"),
    [
        *(("additive", settings, 130, 16) for settings in [(1, 256, 8), (2, 256, 8), (4, 16, 8)]),
        *(("additive", settings, 130, 2) for settings in [(1, 256, 4), (2, 64, 4), (4, 16, 4), (3, 4, 3)]),
        *(("lattice", (bits,), 130, 16) for bits in LATTICE_STAGES),
        *(("uniform", settings, 130, 16) for settings in [(1, 8, False), (2, 64, True), (3, 5, False), (8, 16, False)]),
        ("uniform", (5, 64, True), 130, 2),
        *((kind, settings, 3, 2) for kind, settings in [KINDS[1], KINDS[3], KINDS[4], KINDS[7], KINDS[9]]),
    ],
)  # fmt: skip
def test_so_many_tokens_are_looked_up(
    loop: str, kind: str, settings: tuple[int, ...], rows: int, decoded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vectors do not decode is looked up in tables of floats, and those are slow for more than two tokens."""
    layer, calls, output_of = _layer(kind, settings, (rows, 40), torch.float32), [], QuantizedLinear.output_of
    monkeypatch.setattr(QuantizedLinear, "output_of", lambda *given: calls.append(1) or output_of(*given))
    limit = {"bytes": 16, "vectors": decoded, "floats": 2}[loop]
    for tokens in (1, limit, limit + 1):
        calls.clear()
        with torch.no_grad():
            layer(torch.ones(tokens, 40))
        assert len(calls) == (tokens <= limit), tokens


@pytest.mark.parametrize("tokens", [1, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "settings"), [KINDS[1], KINDS[3], KINDS[8]])
def test_the_dtype_is_that_of_a_dense_layer(
    kind: str, settings: tuple[int, ...], dtype: torch.dtype, tokens: int
) -> None:
    layer, dense = _layer(kind, settings, (5, 13), dtype), nn.Linear(13, 5, dtype=dtype)
    x = torch.ones(tokens, 13, dtype=dtype)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert layer(x).dtype == dense(x).dtype == dtype
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(x).dtype == dense(x).dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "settings"), [KINDS[1], KINDS[3], KINDS[8]])
def test_new_codes_and_tables_are_seen(kind: str, settings: tuple[int, ...]) -> None:
    layer = _layer(kind, settings, (5, 13), torch.float32)
    x = torch.randn(1, 13, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer(x)
        layer.set_codes(layer.codes_unpacked().flip(0 if kind != "lattice" else 1))
        for table in layer.tables().values():
            table.mul_(1.5)
        expected = nn.functional.linear(x, layer.dequantize(), layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_a_model_in_sixteen_bits_takes_layers_whose_tables_are_in_float32(
    kind: str, settings: tuple[int, ...], dtype: torch.dtype, tokens: int
) -> None:
    layer = _layer(kind, settings, (130, 40), torch.float32)
    x = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = nn.functional.linear(x.double(), layer.dequantize().double(), layer.bias.double()).detach()
    limit = 16 * torch.finfo(dtype).eps * float(expected.abs().max())
    outputs = {"trained": layer(x.clone().requires_grad_())}
    outputs["trained"].float().sum().backward()
    with torch.no_grad():
        outputs["used"] = layer(x)
        with materialized(layer):
            outputs["dense"], outputs["again"] = layer(x), layer(x)
            wide = layer(x.float())
    for name, output in outputs.items():
        assert output.dtype == dtype, name
        assert float((output.detach().double() - expected).abs().max()) < limit, name
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
