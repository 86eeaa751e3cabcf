"""Samples, sources, tokens, batches and the two LightningDataModules."""

from casp_pl.data.calibration import CalibrationData
from casp_pl.data.collate import Collator
from casp_pl.data.evaluation import EvaluationData
from casp_pl.data.images import ImageRefusedError, load_image
from casp_pl.data.loaders import FixedLoader, StatefulLoader
from casp_pl.data.sample import Sample, Turn
from casp_pl.data.sources import DataSource, EasyVQA, HuggingFaceText, LlavaJson, PydocProse, TextFiles

__all__ = [
    "CalibrationData",
    "Collator",
    "DataSource",
    "EasyVQA",
    "EvaluationData",
    "FixedLoader",
    "HuggingFaceText",
    "ImageRefusedError",
    "LlavaJson",
    "PydocProse",
    "Sample",
    "StatefulLoader",
    "TextFiles",
    "Turn",
    "load_image",
]
