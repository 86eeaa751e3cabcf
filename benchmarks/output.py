"""Standard output is for Markdown: `python -m benchmarks` puts it into bench.md as it is."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

__all__ = ["stdout_as_stderr"]


@contextmanager
def stdout_as_stderr() -> Iterator[None]:
    """What is printed inside goes to standard error, that of compiled code and of child processes as well."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
