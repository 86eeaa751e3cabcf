"""Where a compiled loop does not load torch takes over, with the same results: only a test of its own notices."""

import torch

from casp_pl.kernels.compiled import additive_loops, lattice_loops, lookup_loops, search_path


def test_every_loop_loads() -> None:
    ours = {
        "additive": additive_loops(torch.empty(0)) is not None,
        "lattice": lattice_loops(torch.empty(0)) is not None,
        "lookup": "floats" in lookup_loops(),
        "vectors": "vectors" in lookup_loops(),
        "search": search_path() == "numba",
    }
    assert all(ours.values()), f"numba belongs to the extra of the tests, but it does not run all of {ours}"
