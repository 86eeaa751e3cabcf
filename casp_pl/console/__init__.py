"""What a run prints: progress, tables, messages. Works without a terminal, in 40 columns and in plain ASCII."""

from casp_pl.console.logs import setup_logging
from casp_pl.console.progress import RunProgress
from casp_pl.console.tables import make_console, print_table

__all__ = ["RunProgress", "make_console", "print_table", "setup_logging"]
