"""How much memory there is, and how much a block-by-block compression needs at most."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.weight_files import tensor_sizes

__all__ = ["PROCESS_BYTES", "StreamingMemory", "fits_in_memory", "free_memory", "has_room", "streaming_memory"]

_COMFORT = 2.2  # a run that is not streamed holds the model and, for evaluation, dense copies of what is compressed
PROCESS_BYTES = 900 << 20  # Python with torch, lightning and transformers, before any weight
_COMPRESSED = 0.5  # bytes of a weight of two to four bits with its tables in float32
_WIDE, _SINGLE = 8, 4  # bytes of a number in sums of moments, and in activations
_MOMENTS = 4  # wide ones: two sums, or one in float32 beside the factors and inverses that a quantizer makes of it


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device; 0 where there is no such device here."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) if torch.cuda.is_available() else 0
    return int(psutil.virtual_memory().available)


def fits_in_memory(directory: Path, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the model of a directory, held in this dtype, leaves enough memory to be compressed."""
    return has_room(sum(tensor_sizes(directory).values()) * dtype.itemsize, device)


def has_room(weight_bytes: int, device: torch.device) -> bool:
    """Whether a model of so many bytes leaves enough memory to be compressed."""
    return _COMFORT * weight_bytes < free_memory(device)


@dataclass(frozen=True)
class StreamingMemory:
    """Bytes at the peak of a block-by-block compression, by what they are for.

    Attributes:
        outside: the parts of the model outside its decoder blocks; put away while blocks are quantized and tuned.
        block: one block, whose linears are replaced one by one, or those of a window; all compressed blocks if they are
            fine-tuned together.
        moments: both second moments of the widest linear and what is derived from them; not while the rest of the model
            is there.
        inputs: inputs of a block and of its linears for all samples; 0 where they lie on disk.
    """

    outside: int
    block: int
    moments: int
    inputs: int

    @property
    def total(self) -> int:
        """All that is there at once, with the process itself."""
        return PROCESS_BYTES + max(self.outside, self.moments) + self.block + self.inputs


def streaming_memory(
    adapter: ModelAdapter,
    tokens: int,
    *,
    dtype: torch.dtype,
    on_disk: bool,
    window: int = 0,
    whole_compressed: bool = False,
) -> StreamingMemory:
    """What the stages of a streamed model hold at most.

    Calibration and quantization do not depend on the number of blocks, block tuning on that of a window; end-to-end
    fine-tuning holds all compressed blocks.

    Args:
        adapter: the model; shapes are all that is read of it.
        tokens: calibration tokens of this process.
        dtype: what matrices are multiplied in (`BlockBatch.autocast`, or that of the weights).
        on_disk: whether block inputs are kept in files.
        window: blocks that are tuned together; 0 without block tuning.
        whole_compressed: whether end-to-end fine-tuning is to be done.
    """
    shapes = adapter.shapes(0)
    weights = sum(rows * columns for rows, columns in shapes.values())
    widest = max(columns for _, columns in shapes.values())
    hidden = shapes[adapter.linear_names[0]][1]
    read = sum(shapes[name][1] for name in adapter.group_heads)
    compressed = int(_COMPRESSED * weights)
    return StreamingMemory(
        outside=sum(parameter.nbytes for parameter in adapter.outside_parameters()),
        block=(window + 1) * weights * adapter.model.dtype.itemsize
        + compressed * (len(adapter.blocks) if whole_compressed else 1),
        moments=_MOMENTS * widest * widest * _WIDE,
        inputs=0 if on_disk else tokens * (3 * hidden * _SINGLE + read * dtype.itemsize),
    )
