"""The embedded demo model."""

from casp_pl.models.demo.language import LANGUAGE_MODEL, load_tokenizer
from casp_pl.models.demo.llava import build_llava, load_demo, load_processor

__all__ = ["LANGUAGE_MODEL", "build_llava", "load_demo", "load_processor", "load_tokenizer"]
