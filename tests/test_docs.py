"""The documents name only what is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEST_ID = re.compile(r"`(tests/[\w/]+\.py)::(\w+)(?:\[[^`]*\])?`")


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_faults_has_a_test_that_exists() -> None:
    rows = [line for line in (ROOT / "docs/faults.md").read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 41))
    for row in rows:
        named = TEST_ID.findall(row)
        assert named, row
        for file, name in named:
            assert (ROOT / file).exists(), file
            assert name in functions_of(ROOT / file), f"{file}::{name}"
