"""The lattice codebooks by their definition, encoding against all 65,536 points."""

import subprocess
import sys

import pytest
import torch

from casp_pl.kernels import lattice_nearest
from casp_pl.kernels.lattice import (
    LATTICE_STAGES,
    QUARTER,
    decode_e8p_reference,
    decode_points,
    e8_residual,
    e8p_even_patterns,
    e8p_patterns,
    e8p_points,
    pack_lattice,
    unpack_lattice,
)
from casp_pl.kernels.lattice_nearest import e8p_candidates, encode_e8p, encode_e8p_reference

CPU = torch.device("cpu")


def _vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(8, count, generator=torch.Generator().manual_seed(seed))


def test_patterns_are_those_of_the_paper() -> None:
    patterns = e8p_patterns(CPU)
    norms = patterns.square().sum(dim=1)
    assert patterns.unique(dim=0).shape == (256, 8)
    assert set(patterns.unique().tolist()) == {0.5, 1.5, 2.5}
    assert [(int(n), int(c)) for n, c in zip(*norms.unique(return_counts=True), strict=True)] == [
        (2, 1),
        (4, 8),
        (6, 28),
        (8, 64),
        (10, 126),
        (12, 29),
    ]
    odd = patterns.sum(dim=1) % 2 == 1
    assert not odd[: e8p_even_patterns()].any()
    assert odd[e8p_even_patterns() :].all()


def test_the_codebook_has_65536_points_of_two_shifted_lattices() -> None:
    points = e8p_points(CPU)
    assert points.dtype == torch.int8
    assert points.shape == (65536, 8)
    assert points.unique(dim=0).shape == (65536, 8)
    for half, shift in ((points[:32768], QUARTER), (points[32768:], -QUARTER)):
        lattice = half * QUARTER - shift
        assert ((lattice - 0.5) % 1 == 0).all()
        assert (lattice.sum(dim=1) % 2 == 0).all()
        assert lattice.square().sum(dim=1).max() == 12
    torch.testing.assert_close(decode_e8p_reference(torch.arange(65536)), points * QUARTER, rtol=0, atol=0)


def test_the_residual_codebook_lies_in_e8() -> None:
    points = e8_residual(CPU) * QUARTER
    assert points.unique(dim=0).shape == (256, 8)
    assert (points.sum(dim=1) % 2 == 0).all()
    halves = (2 * points) % 2
    assert (halves == halves[:, :1]).all()  # all coordinates whole, or all half
    norms, counts = points.square().sum(dim=1).unique(return_counts=True)
    assert norms.tolist() == [2, 4]
    assert counts.tolist() == [240, 16]


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to find near points; without the fixture, the one that is used here."""
    if request.param == "torch":
        monkeypatch.setattr(lattice_nearest, "lattice_loops", lambda _: None)
    else:
        assert lattice_nearest.lattice_loops(torch.empty(0)) is not None, "numba belongs to the extra of the tests"
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [0.3, 1.04, 3.0])
def test_encoding_by_symmetry_is_brute_force(size: float) -> None:
    x = size * _vectors(1501)
    assert torch.equal(encode_e8p(x), encode_e8p_reference(x))


@pytest.mark.usefixtures("way")
def test_points_encode_to_themselves() -> None:
    codes = torch.arange(65536)[::13]
    x = (decode_points(codes, e8p_points(CPU)) * QUARTER).T.contiguous()
    assert torch.equal(encode_e8p(x), codes)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("runs", [1, 4, 32])
def test_candidates_are_the_nearest_of_their_run_and_shift(runs: int) -> None:
    x = _vectors(37)
    found = e8p_candidates(x, runs)
    assert found.shape == (2 * runs, 37)
    distances = torch.cdist(x.T, e8p_points(CPU) * QUARTER)
    codes = torch.arange(65536)
    for number in range(2 * runs):
        members = (codes >> 15 == number // runs) & ((codes & 255) % runs == number % runs)
        expected = distances.masked_fill(~members, torch.inf).amin(dim=1)
        torch.testing.assert_close(distances[torch.arange(37), found[number]], expected)


@pytest.mark.usefixtures("way")
def test_what_is_not_a_number_has_some_code() -> None:
    """It does not happen; but a search for a score that equals itself would leave the array."""
    found = e8p_candidates(torch.full((8, 3), torch.nan), 4)
    assert int(found.min()) >= 0
    assert int(found.max()) < 65536


def test_a_gaussian_costs_what_the_paper_says() -> None:
    x = 1.04 * _vectors(1 << 14)
    points = decode_points(encode_e8p(x), e8p_points(CPU)).T * QUARTER
    assert float((x - points).square().mean()) / 1.04**2 == pytest.approx(0.0912, rel=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_survive_packing_into_bytes(bits: int) -> None:
    stages = LATTICE_STAGES[bits]
    generator = torch.Generator().manual_seed(bits)
    codes = torch.stack([torch.randint(1 << 8 * s.num_bytes, (5, 3), generator=generator) for s in stages])
    codes[:, 0, 0] = torch.tensor([(1 << 8 * s.num_bytes) - 1 for s in stages])
    packed = pack_lattice(codes, bits)
    assert packed.shape == (5, 3, bits)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_lattice(packed, bits), codes)
    assert int(packed[1, 1, 0]) == int(codes[0, 1, 1]) % 256


def test_importing_builds_no_codebook() -> None:
    code = "import casp_pl.quantizers, casp_pl.kernels.lattice as l; print(l.e8p_points.cache_info().currsize)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "0"
