"""Products by look-up against the dense weight in float64, in every loop that runs here."""

import pytest
import torch
from torch import Tensor

from casp_pl.kernels.compiled import lookup_loop, lookup_loops
from casp_pl.kernels.lattice import (
    LATTICE_STAGES,
    QUARTER,
    e8p_pairs,
    e8p_points,
    pack_lattice,
    pairs_of,
    unpack_lattice,
)
from casp_pl.kernels.lookup import CodeRows, lookup_reference
from casp_pl.kernels.uniform import byte_codebook, bytes_of_codes, codes_per_byte
from casp_pl.kernels.vectors import LatticeBytes, e8p_tables

# rows, groups, codebooks, entries, group length, spans
SHAPES = [
    (1, 1, 1, 2, 1, 1),
    (5, 3, 2, 16, 8, 1),
    (3, 7, 3, 256, 5, 4),
    (130, 9, 1, 4, 2, 9),
    (65, 40, 2, 256, 8, 3),
    (300, 33, 1, 128, 3, 2),
    (129, 300, 1, 200, 8, 1),
    (200, 70, 1, 72, 2, 1),
    (4, 5, 2, 256, 8, 1),
    (67, 24, 3, 256, 8, 4),
    (134, 17, 4, 16, 8, 2),
    (70, 6, 5, 32, 8, 2),
]
LOOPS = list(lookup_loops())


def _random(shape: tuple[int, ...], tokens: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, groups, books, entries, length, spans = shape
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, entries, (rows, groups * books), generator=generator, dtype=torch.uint8)
    x = torch.randn(tokens, groups * length, generator=generator)
    codebooks = torch.randn(books, entries, length, generator=generator)
    return codes, x, codebooks, torch.randn(spans, rows, generator=generator)


def _expected(codes: Tensor, x: Tensor, codebooks: Tensor, weights: Tensor) -> Tensor:
    return lookup_reference(codes, x.double(), codebooks.double(), weights.double())


def test_numba_runs_here() -> None:
    from llvmlite import binding

    vbmi = binding.get_host_cpu_features().get("avx512vbmi", False)
    assert [*(["bytes"] if vbmi else []), "vectors", "floats"] == LOOPS, "numba belongs to the extra of the tests"
    assert lookup_loop(torch.device("cpu")) is lookup_loops()[LOOPS[0]]


def test_reference_is_the_formula() -> None:
    codes, x, codebooks, weights = _random((4, 3, 2, 8, 5, 3), tokens=2)
    y = torch.zeros(2, 4)
    for n in range(2):
        for o in range(4):
            for m in range(6):
                group = x[n, 5 * (m // 2) : 5 * (m // 2) + 5]
                y[n, o] += weights[m // 2, o] * (group @ codebooks[m % 2, int(codes[o, m])])
    torch.testing.assert_close(lookup_reference(codes, x, codebooks, weights), y)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_products_are_those_of_the_formula(name: str, shape: tuple[int, ...], tokens: int) -> None:
    codes, x, codebooks, weights = _random(shape, tokens)
    expected = _expected(codes, x, codebooks, weights)
    actual = CodeRows(codes, lookup_loops()[name]).multiply(x, codebooks, weights)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", LOOPS)
def test_an_outlier_costs_others_no_precision(name: str) -> None:
    """As in language models, where one input can be a thousand times the others: still as exact as a dense product."""
    codes, x, codebooks, _ = _random((65, 40, 2, 256, 8, 1))
    x[0, 3] = 3000.0
    weights = torch.ones(1, 65)
    expected = _expected(codes, x, codebooks, weights)
    dense = torch.stack([codebooks[m % 2][codes[:, m].long()] for m in range(80)]).view(40, 2, 65, 8).sum(1)
    rounding = float((x @ dense.permute(0, 2, 1).flatten(0, 1) - expected).abs().max())
    error = CodeRows(codes, lookup_loops()[name]).multiply(x, codebooks, weights) - expected
    assert float(error.abs().max()) < 3 * rounding


@pytest.mark.parametrize("name", LOOPS)
def test_inputs_that_are_not_finite_show_in_their_token_only(name: str) -> None:
    codes, x, codebooks, weights = _random(SHAPES[1], tokens=3)
    clean = CodeRows(codes, lookup_loops()[name]).multiply(x, codebooks, weights)
    x[0, 2], x[2, 5] = float("nan"), float("inf")
    y = CodeRows(codes, lookup_loops()[name]).multiply(x, codebooks, weights)
    assert not y[0].isfinite().any()
    assert not y[2].isfinite().any()
    assert torch.equal(y[1], clean[1])
    x.zero_()
    assert torch.equal(CodeRows(codes, lookup_loops()[name]).multiply(x, codebooks, weights), torch.zeros(3, 5))


def test_every_point_of_e8p_is_four_pairs() -> None:
    points = e8p_points(torch.device("cpu"))
    pairs = pairs_of(points)
    assert pairs.shape == (65536, 4)
    assert torch.equal(e8p_pairs(torch.device("cpu"))[pairs.long()].flatten(1), points)


def test_bytes_of_every_code_of_e8p_make_its_point() -> None:
    codes = torch.arange(65536)
    patterns, signs, shifts = e8p_tables()
    points = patterns[codes & 255] * signs[codes >> 8] + shifts[codes >> 8]
    assert torch.equal(points, e8p_points(torch.device("cpu")) * QUARTER)


@pytest.mark.skipif("vectors" not in LOOPS, reason="this CPU does not decode vectors")
@pytest.mark.parametrize("tokens", [8, 3])  # by fours, and one by one
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_lattice_code_is_decoded(bits: int, tokens: int) -> None:
    """Tokens of which each reads one coordinate of a group, against points that are decoded in float64."""
    generator = torch.Generator().manual_seed(bits)
    numbers = torch.arange(65536)
    fine = [torch.randint(256**stage.num_bytes, (65536,), generator=generator) for stage in LATTICE_STAGES[bits][1:]]
    packed = pack_lattice(torch.stack([numbers, *fine]), bits).unsqueeze(1)
    stages = zip(unpack_lattice(packed, bits)[..., 0], LATTICE_STAGES[bits], strict=True)
    points = [stage.points(codes.device)[codes].double() * QUARTER / stage.scale for codes, stage in stages]
    rows = LatticeBytes(packed, lookup_loops()["vectors"].vectors)
    expected = torch.stack(points).sum(dim=0).T[:tokens]
    torch.testing.assert_close(rows.multiply(torch.eye(8)[:tokens]).double(), expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("columns", "group_size"), [(24, 8), (21, 8), (7, 3), (5, 1)])
def test_bytes_stand_for_their_codes(bits: int, columns: int, group_size: int) -> None:
    codes = torch.randint(0, 1 << bits, (4, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    groups, width = -(-columns // group_size), -(-group_size // codes_per_byte(bits)) * codes_per_byte(bits)
    decoded = byte_codebook(bits)[0][bytes_of_codes(codes, bits, group_size).long()].view(4, groups, width)
    filled = torch.nn.functional.pad(codes, (0, groups * group_size - columns)).view(4, groups, group_size)
    assert torch.equal(decoded[..., :group_size], filled.float())
    assert not decoded[..., group_size:].any()
