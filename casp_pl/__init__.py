"""CASP: compression of large multimodal models to about 2 bits a weight, on Lightning.

`import casp_pl` registers `quant_method` casp with transformers, so that `AutoModelForImageTextToText.from_pretrained`
and its relatives load compressed models.
"""

import casp_pl.checkpoint.registration  # noqa: F401 - registers quant_method casp
from casp_pl.checkpoint.hugging_face import load_compressed

__version__ = "0.1.0"

__all__ = ["__version__", "load_compressed"]
