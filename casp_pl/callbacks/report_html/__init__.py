"""report.html: one file for people, without a network, without a script."""

from casp_pl.callbacks.report_html.page import report_html

__all__ = ["report_html"]
