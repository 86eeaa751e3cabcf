"""Callbacks of the stages, and the report."""

from casp_pl.callbacks.advance import Advance
from casp_pl.callbacks.best_state import BestState
from casp_pl.callbacks.bit_allocation import BitAllocation
from casp_pl.callbacks.codebook_update import CodebookUpdate
from casp_pl.callbacks.low_rank_allocation import LowRankAllocation
from casp_pl.callbacks.stage_checkpoint import StageCheckpoint
from casp_pl.callbacks.stage_report import StageReport

__all__ = [
    "Advance",
    "BestState",
    "BitAllocation",
    "CodebookUpdate",
    "LowRankAllocation",
    "StageCheckpoint",
    "StageReport",
]
