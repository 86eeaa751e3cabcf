"""Samples, sources, tokens, batches and the two LightningDataModules."""

from casp_pl.data.calibration import CalibrationData
from casp_pl.data.collate import Collator
from casp_pl.data.evaluation import EvaluationData
from casp_pl.data.images import ImageRefusedError, LazyImage, StoredImage, load_image
from casp_pl.data.loaders import FixedLoader, StatefulLoader
from casp_pl.data.sample import Sample, Turn
from casp_pl.data.skipped import Skipped
from casp_pl.data.sources import (
    DataSource,
    EasyVQA,
    HuggingFaceConversations,
    HuggingFaceText,
    LlavaJson,
    Mixture,
    PydocProse,
    TextFiles,
)
from casp_pl.data.stream import SampleStream

__all__ = [
    "CalibrationData",
    "Collator",
    "DataSource",
    "EasyVQA",
    "EvaluationData",
    "FixedLoader",
    "HuggingFaceConversations",
    "HuggingFaceText",
    "ImageRefusedError",
    "LazyImage",
    "LlavaJson",
    "Mixture",
    "PydocProse",
    "Sample",
    "SampleStream",
    "Skipped",
    "StatefulLoader",
    "StoredImage",
    "TextFiles",
    "Turn",
    "load_image",
]
