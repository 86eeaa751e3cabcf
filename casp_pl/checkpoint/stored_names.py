"""Under which names, and as which types, the tensors of a model lie in its files."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPE_NAMES", "names_in_files", "state_without_aliases"]

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def state_without_aliases(model: Any) -> dict[str, Tensor]:
    """The state dict, of tied tensors only the one that `save_pretrained` writes."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state: dict[str, Tensor] = remove_tied_weights_from_state_dict(model.state_dict(), model)
    return state


def names_in_files(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names that they have in a file."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, state))
