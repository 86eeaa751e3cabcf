"""Compressed models in other people's evaluation harnesses: lm-eval and lmms-eval (extra `eval`)."""

from casp_pl.harness.command import HARNESSES, run_harness

__all__ = ["HARNESSES", "run_harness"]
