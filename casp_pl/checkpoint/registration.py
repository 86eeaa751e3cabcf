"""`quant_method` casp for transformers: `from_pretrained` builds the compressed skeleton and reads the weights into it.

Importing this module registers both classes. It imports transformers (about 1.4 CPU seconds beyond torch), and
`casp_pl/__init__` imports it: `AutoModelForImageTextToText.from_pretrained(directory)` must work after
`import casp_pl`, whichever package came first, and transformers learns of a method in no other way.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from casp_pl.checkpoint.model_directory import (
    FORMAT_VERSION,
    QUANT_METHOD,
    check_header,
    check_weight_files,
    checked_modules,
)
from casp_pl.checkpoint.stored_names import compact_state_dict
from casp_pl.errors import IntegrityError
from casp_pl.models.surgery import install_layers

__all__ = ["CaspConfig", "CaspHfQuantizer"]


@register_quantization_config(QUANT_METHOD)
class CaspConfig(QuantizationConfigMixin):
    """The `quantization_config` in config.json.

    Args:
        modules: full in-memory module name to the spec of the layer that replaces the linear there.
        version: of this format.
        quant_method: always `casp`.

    Raises:
        IntegrityError: unknown keys, another version, or a spec that describes no layer.
    """

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if unknown or quant_method != QUANT_METHOD:
            raise IntegrityError(f"quantization_config: unknown keys {sorted(unknown)} for method {quant_method}.")
        self.quant_method = quant_method  # type: ignore[assignment]  # their enum lists only their own
        self.modules = checked_modules(modules or {}, version)
        self.version = version


@register_quantizer(QUANT_METHOD)
class CaspHfQuantizer(HfQuantizer):
    """Loads what `save_compressed` wrote. It does not quantize: a plain model is refused (`requires_calibration`).

    Attributes:
        half: the 16-bit type of what is saved uncompressed, see `compact_state_dict`.
    """

    requires_calibration = True
    half: torch.dtype = torch.float16
    quantization_config: CaspConfig

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        checkpoint_files: Sequence[str] | None = None,
        **_: Any,
    ) -> None:
        directory = Path(str(getattr(model.config, "name_or_path", "")))
        if checkpoint_files and directory.is_dir():
            check_weight_files(directory, checkpoint_files)
            for file in checkpoint_files:
                check_header(Path(file))
        install_layers(model, self.quantization_config.modules)

    def is_serializable(self) -> bool:
        """The model can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codebooks, scales and everything uncompressed take gradients."""
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes."""
        return compact_state_dict(model, self.half), {}
