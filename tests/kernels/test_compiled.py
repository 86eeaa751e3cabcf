"""Compiled loops fall back to torch without a word to the caller, so that they load is a test of its own."""

import pytest

from casp_pl.kernels.compiled import _load

LOOPS = [
    ("additive", "gather"),
    ("additive", "scatter"),
    ("lattice", "candidates"),
    ("lattice", "nearest"),
    ("lookup", "lookup"),
    ("search", "search"),
]


@pytest.mark.parametrize(("module", "name"), LOOPS)
def test_every_loop_loads(module: str, name: str) -> None:
    assert _load(module, name) is not None, "numba belongs to the extra of the tests"
