"""What the shares are made of: operations counted once, loops as a whole, both passes in the same state."""

import pytest
import torch
from torch.profiler import record_function

from benchmarks.aqlm import random_case
from benchmarks.shares import LISTED, Tally, measure
from casp_pl.quantizers import GPTQQuantizer, gptq

A, B = torch.ones(3, 4), torch.ones(4, 5)
OPERATIONS = {
    "mm": (lambda: A @ B, 120),
    "mm into a tensor": (lambda: torch.mm(A, B, out=torch.empty(3, 5)), 120),
    "einsum": (lambda: torch.einsum("ij,jk->ik", A, B), 120),
    "linear": (lambda: torch.nn.functional.linear(A, B.T), 120),
    "bmm": (lambda: A.expand(2, 3, 4) @ B.expand(2, 4, 5), 240),
    "baddbmm": (lambda: torch.baddbmm(torch.zeros(5), A.expand(2, 3, 4), B.expand(2, 4, 5), alpha=2), 240),
    "addmm": (lambda: torch.addmm(torch.zeros(5), A, B), 120),
    "addmm_": (lambda: torch.zeros(3, 5).addmm_(A, B, alpha=-1), 120),
    "mv": (lambda: A @ B[:, 0], 24),
    "addmv": (lambda: torch.addmv(torch.zeros(3), A, B[:, 0]), 24),
    "no product": (lambda: A * A, 0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_operations_of_a_product_are_counted_once(name):
    work, expected = OPERATIONS[name]
    with torch.no_grad(), Tally() as tally:
        work()
    assert sum(tally.operations.values()) == expected
    assert set(tally.operations) <= {torch.float32}


def test_operations_are_counted_by_dtype():
    with Tally() as tally:
        A.double() @ B.double()
        A @ B
    assert tally.operations == {torch.float64: 120, torch.float32: 120}


def test_what_a_loop_calls_is_the_loops():
    with Tally() as tally:
        with record_function("casp_pl::search"):
            A.sin()
        A.cos()
    assert dict(tally.calls) == {"casp_pl::search": 1, "cos": 1}
    assert set(tally.seconds) == set(tally.calls)


def test_both_passes_factorise_every_moment_once(monkeypatch):
    """Two matrices read one input, as W_gate and W_up do."""
    seen, make = [], gptq.ordered_feedback
    monkeypatch.setattr(gptq, "ordered_feedback", lambda moment, *rest: seen.append(moment) or make(moment, *rest))
    (weight, moment), (other, own) = random_case(24, 16), random_case(16, 32)
    rates = {torch.float32: 1e9, torch.float64: 1e9}
    shares = measure(GPTQQuantizer(group_size=16), [(weight, moment), (weight, moment), (other, own)], rates)
    assert [len(each) for each in seen] == 3 * [16, 32]  # one pass to warm up, one that is timed, one for the shares
    assert len({id(each) for each in seen}) == len(seen)  # `seen` keeps them: an id is not used again
    assert shares.total > 0
    assert shares.at_rate > 0
    assert shares.products > 0
    assert shares.loops == 0  # GPTQ has none
    assert len(shares.longest.split("), ")) == LISTED
    assert len(shares.cells()) == 5
