"""Compressed models in the layouts of other tools."""

from casp_pl.export.export import EXPORT_DTYPES, EXPORT_FORMATS, export_model

__all__ = ["EXPORT_DTYPES", "EXPORT_FORMATS", "export_model"]
