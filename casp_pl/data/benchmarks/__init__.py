"""Questions of published benchmarks, read from the files that their authors publish, with LLaVA's prompts."""

from casp_pl.data.benchmarks.base import Benchmark
from casp_pl.data.benchmarks.gqa import GQA
from casp_pl.data.benchmarks.mme import MME
from casp_pl.data.benchmarks.pope import POPE
from casp_pl.data.benchmarks.science_qa import ScienceQA
from casp_pl.data.benchmarks.seed_bench import SEEDBench
from casp_pl.data.benchmarks.text_vqa import TextVQA
from casp_pl.data.benchmarks.vqa_v2 import VQAv2

__all__ = ["GQA", "MME", "POPE", "Benchmark", "SEEDBench", "ScienceQA", "TextVQA", "VQAv2"]
