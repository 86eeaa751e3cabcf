"""Where a compiled loop does not load torch takes over, with the same results: only a test of its own notices."""

import importlib
import logging
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager

import numba
import pytest
import torch

from casp_pl.kernels import compiled
from casp_pl.kernels.compiled import (
    additive_loops,
    backend_name,
    gather_loop,
    lattice_loops,
    lookup_loop,
    lookup_loops,
    search_loops,
    weight_loops,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ON_GPU = types.SimpleNamespace(device=GPU, dtype=torch.float32)  # as much of a tensor as is asked for


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Everything is tried again, and what it comes to is forgotten after the test."""
    for name in ("_load", "_numba", "_triton", "lookup_loops"):
        monkeypatch.setattr(compiled, name, compiled.cache(getattr(compiled, name).__wrapped__))
    return monkeypatch


def _loaded() -> dict[str, bool]:
    numbers = torch.empty(0, dtype=torch.float32, device=CPU)
    return {
        "additive": additive_loops(numbers) is not None,
        "lattice": lattice_loops(numbers) is not None,
        "lookup": "floats" in lookup_loops(),
        "vectors": "vectors" in lookup_loops(),
        "search": search_loops(numbers) is not None,
        "weight": weight_loops(CPU, torch.float32) is not None,
    }


def test_every_loop_loads() -> None:
    ours = _loaded()
    assert all(ours.values()), f"numba belongs to the extra of the tests, but it does not run all of {ours}"


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.device("meta")], ids=str)
def test_every_loop_loads_whatever_the_defaults_are(
    default: torch.dtype | torch.device, under_default: Callable[..., AbstractContextManager[None]]
) -> None:
    with under_default(default):
        ours, names = _loaded(), list(lookup_loops())
    assert all(ours.values()), ours
    assert list(lookup_loops()) == names


def test_a_trial_that_fails_leaves_the_number_of_threads(anew: pytest.MonkeyPatch) -> None:
    def gather(*_: object) -> None:
        torch.set_num_threads(1)
        raise RuntimeError

    anew.setitem(sys.modules, "casp_pl.kernels.numba_broken", types.SimpleNamespace(gather=gather))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert compiled._load("broken", "gather") is None
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


RAW = [
    ("lookup", "lookup"),
    ("bytes", "lookup_bytes"),
    *(("vectors", f"multiply_{kind}") for kind in ("additive", "lattice", "uniform")),
    *(("vectors", f"rebuild_{kind}") for kind in ("additive", "lattice")),
    *(("search", name) for name in ("nearest_entries", "search", "improve")),
]
"""Loops that go to addresses: a module and a name."""


@pytest.mark.parametrize(("module", "name"), RAW)
def test_no_loop_goes_to_the_address_of_something_else(module: str, name: str) -> None:
    loop = getattr(importlib.import_module(f"casp_pl.kernels.numba_{module}"), name)
    given = compiled._smallest_arguments(name)
    places = [place for place, argument in enumerate(given) if isinstance(argument, torch.Tensor)]
    assert len(places) >= 4
    for place in places:
        for other in (torch.bfloat16, torch.float64, torch.int32, torch.device("meta")):
            wrong = [argument.to(other) if at == place else argument for at, argument in enumerate(given)]
            with pytest.raises(TypeError, match="this loop takes torch.float32, .* not"):
                loop(*wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_no_loop_is_compiled_for_other_floats(dtype: torch.dtype) -> None:
    loops = additive_loops(torch.empty(0))
    codes, books, scales, weight, bounds, sums, dots = compiled._smallest_arguments("scatter")
    with pytest.raises(TypeError, match="compute in torch.float32, not"):
        loops.scatter(codes, books.to(dtype), scales, weight, bounds, sums, dots)


def test_the_name_is_that_of_the_loop_that_is_taken() -> None:
    name = backend_name(CPU)
    kind = name.split("(")[1].rstrip(")")
    assert name == f"numba {numba.__version__} ({kind})"
    assert lookup_loop(CPU) is lookup_loops()[kind]


def test_one_line_says_that_torch_does_the_work(anew: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    anew.setitem(sys.modules, "numba", None)
    with caplog.at_level(logging.INFO):
        assert backend_name(CPU) == "torch"
        assert search_loops(torch.empty(0)) is None
        assert additive_loops(torch.empty(0)) is None
        assert lattice_loops(torch.empty(0)) is None
    (line,) = caplog.messages
    assert "done by torch" in line
    assert "numba" in line


def test_a_gpu_has_triton_only_where_its_kernel_runs(
    anew: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    anew.setitem(sys.modules, "casp_pl.kernels.triton_lookup", None)
    with caplog.at_level(logging.INFO):
        assert backend_name(GPU) == "torch"
        assert backend_name(GPU) == "torch"
        assert gather_loop(ON_GPU) is None
    assert len(caplog.messages) == 1
    assert "Triton does not run here" in caplog.text
    anew.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.9.0"))
    kernels = types.SimpleNamespace(look_up=object(), gather=object())
    anew.setattr(compiled, "_triton", lambda: kernels)
    assert backend_name(GPU) == "Triton 3.9.0 for few tokens and weights of AQLM, torch for all else"
    assert lookup_loop(GPU) is kernels.look_up
    assert gather_loop(ON_GPU) is kernels.gather
    assert gather_loop(types.SimpleNamespace(device=GPU, dtype=torch.bfloat16)) is None


def test_other_devices_are_left_to_torch() -> None:
    assert backend_name(torch.device("meta")) == "torch"
