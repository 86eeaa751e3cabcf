"""Under which names, and as which types, the tensors of a model lie in its files."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from casp_pl.layers import QuantizedLinear
from casp_pl.models.surgery import compressed_layers

__all__ = [
    "DTYPE_NAMES",
    "compact_state_dict",
    "compressed_tables",
    "half_of",
    "names_in_files",
    "state_without_aliases",
]

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def half_of(headers: Mapping[str, torch.dtype] | None) -> torch.dtype:
    """The 16-bit type of what a compressed model keeps of an original; None: all of that is float16."""
    return torch.bfloat16 if headers is not None and torch.bfloat16 in headers.values() else torch.float16


def compact_state_dict(module: nn.Module, half: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The state dict, float32 tensors in 16 bits where that is exact; tied tensors stay tied.

    Args:
        module: a compressed model, or a part of it.
        half: `half_of` the original: the first choice for what was not compressed, so that what the original has in
            this type keeps it whatever its values are. For tables of compressed layers float16 is the first choice.

    Returns:
        The names of the state dict and tensors of the same shapes; float32 where neither 16-bit type is exact.
    """
    other = torch.float16 if half is torch.bfloat16 else torch.bfloat16
    tables = {table.data_ptr() for table in compressed_tables(module)}
    stored: dict[tuple[Any, ...], Tensor] = {}
    compact = {}
    for name, tensor in module.state_dict().items():
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        choice = (torch.float16, torch.bfloat16) if tensor.data_ptr() in tables else (half, other)
        compact[name] = stored.setdefault(key, _in_16_bits(tensor, choice)) if tensor.numel() else tensor
    return compact


def _in_16_bits(tensor: Tensor, choice: Iterable[torch.dtype]) -> Tensor:
    if tensor.dtype is torch.float32:
        for dtype in choice:
            rounded = tensor.to(dtype)
            if torch.equal(rounded.to(torch.float32), tensor):
                return rounded
    return tensor


def compressed_tables(module: nn.Module) -> Iterator[Tensor]:
    """What quantization leaves of weights beside codes: codebooks, scales, signs, and factors that stay dense."""
    for layer in compressed_layers(module).values():
        for part in layer.modules():
            if isinstance(part, QuantizedLinear):
                yield from part.tables().values()
            elif isinstance(part, nn.Linear):
                yield part.weight


def state_without_aliases(model: Any) -> dict[str, Tensor]:
    """The state dict, of tied tensors only the one that `save_pretrained` writes."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state: dict[str, Tensor] = remove_tied_weights_from_state_dict(model.state_dict(), model)
    return state


def names_in_files(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names that they have in a file."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, state))
