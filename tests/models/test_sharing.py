"""Linears shared out among processes."""

import pytest

from casp_pl.models import sharing

ATTENTION = {"q": 4.0, "k": 4.0, "v": 4.0}
GROUPED_QUERIES = {"q": 9.0, "k": 3.0, "v": 3.0}
MLP = {"gate": 8.0, "up": 8.0}


def test_every_linear_is_made_once_and_no_process_has_more_than_it_must() -> None:
    costs = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 3.0, "e": 3.0}
    shares = sharing.shared_out(costs, 2)
    assert sorted(name for names in shares for name in names) == list(costs)
    assert sorted(sum(costs[name] for name in names) for names in shares) == [8.0, 10.0]
    assert sharing.shared_out({"a": 1.0}, 3) == [["a"], [], []]


@pytest.mark.parametrize(
    ("costs", "processes", "expected"),
    [
        ({"down": 1.0}, 1, False),
        (MLP, 1, False),
        ({"down": 1.0}, 2, True),
        (MLP, 2, False),
        (MLP, 3, True),
        (MLP, 4, True),
        (ATTENTION, 2, True),  # one process would have two of three
        (ATTENTION, 3, False),
        (GROUPED_QUERIES, 2, False),
        (GROUPED_QUERIES, 4, True),
    ],
)
def test_linears_are_made_together_where_some_processes_would_wait_long(
    costs: dict[str, float], processes: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "process_count", lambda: processes)
    assert sharing.are_uneven(costs) is expected
