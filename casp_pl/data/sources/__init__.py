"""Where samples come from."""

from casp_pl.data.sources.base import DataSource, Row, Split
from casp_pl.data.sources.easy_vqa import EasyVQA, load_easy_vqa
from casp_pl.data.sources.hugging_face import HuggingFaceConversations, HuggingFaceText
from casp_pl.data.sources.llava_json import LlavaJson
from casp_pl.data.sources.mixture import Mixture
from casp_pl.data.sources.pydoc_prose import PydocProse
from casp_pl.data.sources.text_files import TextFiles

__all__ = [
    "DataSource",
    "EasyVQA",
    "HuggingFaceConversations",
    "HuggingFaceText",
    "LlavaJson",
    "Mixture",
    "PydocProse",
    "Row",
    "Split",
    "TextFiles",
    "load_easy_vqa",
]
