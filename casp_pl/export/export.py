"""One compressed model in, one directory in another tool's layout out.

| format | read by | can hold |
| --- | --- | --- |
| dense | whatever reads the original architecture | everything; low-rank products are multiplied out |
| aqlm | transformers with the package aqlm | additive codes of one format in all decoder linears |
| gptq | transformers or gptqmodel; zero points less one, as v1 stores them | uniform codes, bits by module |
| gptq_v2 | gptqmodel | the same, zero points as they are |
| casp | transformers after `import casp_pl` | everything |
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from casp_pl.checkpoint import load_compressed, require_new, save_compressed, save_plain
from casp_pl.errors import ConfigError, NumericsError
from casp_pl.export.aqlm import to_aqlm
from casp_pl.export.dense import to_dense
from casp_pl.export.gptq import to_gptq

__all__ = ["EXPORT_DTYPES", "EXPORT_FORMATS", "export_model"]

# changes the model in place to what is stored, and returns its quantization_config
Converter = Callable[[Any], dict[str, Any] | None]
_CONVERTERS: dict[str, Converter] = {
    "dense": to_dense,
    "aqlm": to_aqlm,
    "gptq": partial(to_gptq, version=1),
    "gptq_v2": partial(to_gptq, version=2),
}
EXPORT_FORMATS = (*_CONVERTERS, "casp")
EXPORT_DTYPES = ("float16", "bfloat16")


def export_model(source: Path | str, out: Path | str, format: str, *, dtype: str | None = None) -> None:
    """Write the compressed model of `source` in another layout; `out` is absent or complete.

    Args:
        source: what `save_compressed` wrote.
        out: a new directory.
        format: one of `EXPORT_FORMATS`.
        dtype: float16 or bfloat16, of everything but codes; None keeps float32 where float16 does not hold all values,
            and with them the logits.

    Raises:
        ConfigError: an unknown format or dtype, or a model that the format cannot hold; the message says what would.
        InputError, IntegrityError: `source` is no sound compressed model.
        NumericsError: the dtype does not hold a value.
        ResourceError: `out` exists or cannot be written.
    """
    if format not in EXPORT_FORMATS or dtype not in (None, *EXPORT_DTYPES):
        raise ConfigError(
            f"cannot export as {format} in {dtype}: formats are {', '.join(EXPORT_FORMATS)},\n"
            f"dtypes are {', '.join(EXPORT_DTYPES)}."
        )
    if format == "casp" and dtype is not None:
        raise ConfigError("casp keeps what was fine-tuned as it is: leave --dtype out, or export as dense.")
    require_new(out)
    model, processor = load_compressed(source)
    card = f"Exported by casp_pl from a CASP model, format {format}.\n"
    if format == "casp":
        save_compressed(model, processor, out, card=card)
        return
    config = _CONVERTERS[format](model)
    if dtype is not None:
        _narrow(model, getattr(torch, dtype))
    save_plain(model, processor, out, card=card, quantization_config=config)


def _narrow(model: nn.Module, dtype: torch.dtype) -> None:
    """All floating tensors to `dtype`, in place."""
    finite = {name for name, tensor in model.state_dict().items() if tensor.isfinite().all()}
    model.to(dtype)
    for name, tensor in model.state_dict().items():
        if name in finite and not tensor.isfinite().all():
            raise NumericsError(f"{name} holds values beyond {dtype}.\nExport as bfloat16, or without --dtype.")
