"""The embedded demo model."""

from casp_pl.models.demo.language import load_tokenizer
from casp_pl.models.demo.llava import build_llava, load_demo, load_processor

__all__ = ["build_llava", "load_demo", "load_processor", "load_tokenizer"]
