"""`python -m casp_pl`."""

from casp_pl.cli import run

run()
