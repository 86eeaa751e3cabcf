"""Figures of a model: answers to questions about images, perplexity, and the distance to the original model."""

from casp_pl.evaluation.cost import DecodeCost, measure_decoding, resident_beside
from casp_pl.evaluation.figures import StageFigures
from casp_pl.evaluation.metrics import FlipRate, KLDivergence, Perplexity, VQAAccuracy
from casp_pl.evaluation.paired import PairedAccuracy, PairedFigures
from casp_pl.evaluation.reference import ReferenceOutputs
from casp_pl.evaluation.vqa import VQAOutputs, evaluate_vqa

__all__ = [
    "DecodeCost",
    "FlipRate",
    "KLDivergence",
    "PairedAccuracy",
    "PairedFigures",
    "Perplexity",
    "ReferenceOutputs",
    "StageFigures",
    "VQAAccuracy",
    "VQAOutputs",
    "evaluate_vqa",
    "measure_decoding",
    "resident_beside",
]
