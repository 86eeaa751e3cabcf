"""What a run prints: progress, tables, messages. Works without a terminal, in 40 columns and in plain ASCII.

One rule for standard output: tables narrow themselves, prose is broken between words, and what is to be copied (paths,
names of modules) stays whole. Messages on standard error have one line each, for scripts that look for them.
"""

from casp_pl.console.logs import setup_logging
from casp_pl.console.progress import RunProgress
from casp_pl.console.prose import print_path, print_text
from casp_pl.console.tables import make_console, print_table

__all__ = ["RunProgress", "make_console", "print_path", "print_table", "print_text", "setup_logging"]
