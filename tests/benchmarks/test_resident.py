"""Memory of a piece of work, whatever the process held before."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json
from benchmarks.resident import peaks_of
first, second = (peaks_of(lambda: bytearray(b"1" * size)) for size in (200 << 20, 50 << 20))
print(json.dumps([first, second]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_a_peak_starts_again():
    """`bytearray` copies: twice the size for a moment."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, cwd=ROOT)
    (first_peak, first), (second_peak, second) = json.loads(done.stdout)
    assert first == pytest.approx(400 << 20, rel=0.1)
    assert second == pytest.approx(100 << 20, rel=0.1)
    assert second_peak == pytest.approx(first_peak, rel=0.02)
