"""Models: where their parts lie, how blocks are compressed, the demo and the tiny model."""

from casp_pl.models.adapter import ModelAdapter, adapt
from casp_pl.models.load import load_model

__all__ = ["ModelAdapter", "adapt", "load_model"]
