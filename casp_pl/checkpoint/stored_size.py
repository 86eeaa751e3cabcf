"""How large files will be, to the byte, before the numbers in them exist.

A safetensors file is 8 bytes of length, a JSON header that is padded to a multiple of 8, and the tensors without gaps.
Source: the format's description at github.com/huggingface/safetensors.
"""

import copy
import json
import math
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from casp_pl.checkpoint.atomic import METADATA_KEY
from casp_pl.checkpoint.hugging_face import without_progress_bars
from casp_pl.checkpoint.registration import CaspConfig
from casp_pl.checkpoint.stored_names import DTYPE_NAMES, compressed_tables, names_in_files, state_without_aliases
from casp_pl.checkpoint.streamed import file_names, write_index
from casp_pl.models.surgery import layer_specs

__all__ = ["ModelSize", "StoredTensor", "model_size", "run_file_bytes", "safetensors_bytes"]

# the safetensors package sorts tensors so, and then by name
_ORDER = (
    torch.int64, torch.float64, torch.float32, torch.int32,
    torch.bfloat16, torch.float16, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """What a file holds of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a compressed model's directory, but README.md and manifest.json, which tell what was measured.

    Attributes:
        weights: of all safetensors files, headers included.
        files: how many these are: model.safetensors, or one for each block and one for the rest.
        tensors: of these, the numbers: what reports call the size of a model.
        beside: config, processor and tokenizer, and the index of several files.
        undecided: bytes by which `weights` is smaller if all float32 tensors whose values nobody has seen fit into 16
            bits.
        mixed: the original holds both float16 and bfloat16; the header may differ by some bytes. The size is exact
            where nothing is undecided or mixed.
    """

    weights: int
    tensors: int
    beside: int
    files: int
    undecided: int
    mixed: bool


def safetensors_bytes(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> int:
    """Size of a safetensors file with these tensors."""
    # the order decides how many digits the offsets have
    ordered = sorted(tensors.items(), key=lambda item: (_ORDER.index(item[1].dtype), item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in ordered:
        end = at + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + at


def run_file_bytes(tensors: Mapping[str, Tensor], metadata: Any) -> int:
    """Size of the file that `write_safetensors` makes of these tensors, which may lie on the meta device."""
    stored = {name: StoredTensor(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return safetensors_bytes(stored, {METADATA_KEY: json.dumps(metadata, sort_keys=True, allow_nan=False)})


def model_size(
    model: Any,
    processor: Any,
    headers: Mapping[str, torch.dtype] | None,
    *,
    trained: Collection[str] = (),
    block_prefix: str | None = None,
) -> ModelSize:
    """Size of the directory that a run will write.

    It is that of `save_compressed`, exact up to the 50 GB at which weights are split, or of `save_streamed`.

    Args:
        model: the compressed model on the meta device; it stays as it is.
        processor: saved beside it; None for none.
        headers: dtypes of the original's tensors by their names in its files; None where float16 holds every value.
        trained: names of the parameters that fine-tuning changes. Tables are rounded to float16 then, but norms and
            biases keep float32.
        block_prefix: of a model whose blocks stay on disk, what their names begin with, for example `model.layers.`;
            its directory has one file for each block.
    """
    model = copy.deepcopy(model)  # of structure alone
    specs = layer_specs(model)
    for table in compressed_tables(model):
        table.data = table.data.to(torch.float16)
    state = state_without_aliases(model)
    changed = {id(tensor) for name, tensor in state.items() if name in trained}
    files: list[dict[str, StoredTensor]] = []
    unseen = 0
    for part in _by_file(state, block_prefix):
        stored = {}
        for name, tensor in names_in_files(model, part).items():
            dtype = tensor.dtype
            if dtype is torch.float32 and id(tensor) not in changed:
                there = torch.float16 if headers is None else _dtype_there(name, headers)
                if there is torch.float16 or there is torch.bfloat16:
                    dtype = there
                else:
                    unseen += tensor.nbytes
            stored[name] = StoredTensor(dtype, tuple(tensor.shape))
        files.append(stored)
    return ModelSize(
        weights=sum(safetensors_bytes(stored, {"format": "pt"}) for stored in files),
        tensors=sum(tensor.nbytes for stored in files for tensor in stored.values()),
        beside=_beside(model, processor, specs, files),
        files=len(files),
        undecided=unseen // 2,
        mixed=headers is not None and {torch.float16, torch.bfloat16} <= set(headers.values()),
    )


def _by_file(state: Mapping[str, Tensor], block_prefix: str | None) -> list[dict[str, Tensor]]:
    """The tensors of each file by their names in memory; those outside the blocks first."""
    if block_prefix is None:
        return [dict(state)]
    parts: dict[int, dict[str, Tensor]] = {-1: {}}
    for name, tensor in state.items():
        place = re.match(rf"{re.escape(block_prefix)}(\d+)\.", name)
        parts.setdefault(int(place[1]) if place else -1, {})[name] = tensor
    return [parts[number] for number in sorted(parts)]


def _dtype_there(name: str, headers: Mapping[str, torch.dtype]) -> torch.dtype | None:
    return headers.get(name.replace(".output_factor.", "."))  # the bias of a low-rank product


def _beside(
    model: Any,
    processor: Any,
    specs: Mapping[str, Mapping[str, Any]],
    weights: Sequence[Mapping[str, StoredTensor]],
) -> int:
    """Bytes of configs, of the index of several files of `weights`, and of the processor's files.

    They are written, and thrown away.
    """
    if len(weights) == 1:
        model.config.quantization_config = CaspConfig(modules=specs)
    with tempfile.TemporaryDirectory() as folder, without_progress_bars():
        model.save_pretrained(folder, state_dict={})
        if len(weights) > 1:
            names = zip(file_names(len(weights) - 1), weights, strict=True)
            places = {name: file for file, stored in names for name in stored}
            total = sum(tensor.nbytes for stored in weights for tensor in stored.values())
            write_index(Path(folder), specs, places, total)
        if processor is not None:
            processor.save_pretrained(folder)
        files = [path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".safetensors"]
        return sum(path.stat().st_size for path in files)
