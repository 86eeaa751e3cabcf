"""Where a compiled loop does not load torch takes over, with the same results: only a test of its own notices."""

import logging
import sys
import types

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
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ON_GPU = types.SimpleNamespace(device=GPU, dtype=torch.float32)  # as much of a tensor as is asked for


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Everything is tried again, and what it comes to is forgotten after the test."""
    for name in ("_load", "_numba", "_triton", "lookup_loops"):
        monkeypatch.setattr(compiled, name, compiled.cache(getattr(compiled, name).__wrapped__))
    return monkeypatch


def test_every_loop_loads() -> None:
    ours = {
        "additive": additive_loops(torch.empty(0)) is not None,
        "lattice": lattice_loops(torch.empty(0)) is not None,
        "lookup": "floats" in lookup_loops(),
        "vectors": "vectors" in lookup_loops(),
        "search": search_loops(torch.empty(0)) is not None,
    }
    assert all(ours.values()), f"numba belongs to the extra of the tests, but it does not run all of {ours}"


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
