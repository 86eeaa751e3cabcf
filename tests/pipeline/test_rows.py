"""The rows that a fit prints."""

from typing import Any

from casp_pl.allocation import CompressionPlan, ModulePlan
from casp_pl.models.compress import LinearReport
from casp_pl.pipeline.rows import show_block


class _Lines:
    """Stands for `RunProgress`."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def detail(self, *parts: str, time: str) -> None:
        self.lines.append(" ".join(parts))

    row = detail


def test_dead_inputs_are_listed_by_linear() -> None:
    plans = [ModulePlan(name, 0, (4, 8), "any", 2, None, None, 1.0, "") for name in ("b.q_proj", "b.k_proj")]
    reports = [LinearReport("b.q_proj", 0.1, 2.0, 2.5, 1.0, 3), LinearReport("b.k_proj", 0.1, 2.0, 2.5, 1.0)]
    progress: Any = _Lines()
    show_block(progress, 0, reports, CompressionPlan("tiny", tuple(plans), 2.5, "total", 2.0, 2.5))
    query, key, block = progress.lines
    assert query.endswith("3 dead inputs")
    assert "dead" not in key
    assert "dead" not in block
