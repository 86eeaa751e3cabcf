"""LightningModules: calibration, block-wise fine-tuning, end-to-end fine-tuning, evaluation."""

from casp_pl.modules.blockwise import BlockwiseModule
from casp_pl.modules.calibration import CalibrationModule
from casp_pl.modules.end_to_end import EndToEndModule
from casp_pl.modules.statistics import CalibrationStatistics

__all__ = ["BlockwiseModule", "CalibrationModule", "CalibrationStatistics", "EndToEndModule"]
