"""How much memory there is, and how much a block-by-block compression needs at most."""

from dataclasses import dataclass

import psutil
import torch

from casp_pl.models.adapter import ModelAdapter
from casp_pl.processes import of_all

__all__ = ["PROCESS_BYTES", "Memory", "StreamingMemory", "free_memory", "has_room", "streaming_memory"]

_COMFORT = 2.2  # a run that is not streamed holds the model and, for evaluation, dense copies of what is compressed
PROCESS_BYTES = 900 << 20  # Python with torch, lightning and transformers, before any weight
_COMPRESSED = 0.5  # bytes of a weight of two to four bits with its tables in float32
_WIDE = 8  # bytes of a number in sums of moments
_MOMENTS = 2.75  # wide ones: half of one, the moment in float32, beside what QuIP# makes of it; two sums are less


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        device: where the model is computed.
        host: of the machine beside its GPU; where the machine itself computes, nothing is needed but `device`.
    """

    device: int
    host: int = 0

    def within(self, free: "Memory") -> bool:
        """Whether there is as much."""
        return self.device <= free.device and self.host <= free.host


def free_memory(device: torch.device, sharing: int) -> Memory:
    """What every process of a run can have. All hear the same, the least of all: what they decide by it they agree on.

    Args:
        device: where this process computes.
        sharing: processes that have the memory of one machine in equal parts; a GPU belongs to one process.
    """
    host = psutil.virtual_memory().available // sharing
    here = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host
    offers = of_all((here, host))
    return Memory(*map(min, zip(*offers, strict=True)))


def has_room(weight_bytes: int, free: Memory) -> bool:
    """Whether a model of so many bytes leaves enough memory to be compressed; it passes through the host's."""
    return _COMFORT * weight_bytes < free.device and weight_bytes < free.host


@dataclass(frozen=True)
class StreamingMemory:
    """Bytes at the peak of a block-by-block compression, by what they are for; activations come on top.

    Attributes:
        outside: the parts of the model outside its decoder blocks; put away while blocks are quantized and tuned, in
            float32 while all compressed blocks are trained.
        block: one block, whose linears are replaced one by one, or those of a window; all compressed blocks if they are
            fine-tuned together.
        moments: both second moments of the widest linear and what is derived from them; not while the rest of the model
            is there.
    """

    outside: int
    block: int
    moments: int

    @property
    def total(self) -> int:
        """All that is there at once."""
        return max(self.outside, self.moments) + self.block


def streaming_memory(
    adapter: ModelAdapter,
    *,
    window: int = 0,
    whole_compressed: bool = False,
    compressed: float = _COMPRESSED,
) -> StreamingMemory:
    """What the stages of a streamed model hold at most.

    Calibration and quantization do not depend on the number of blocks, block tuning on that of a window; end-to-end
    fine-tuning holds all compressed blocks.

    Args:
        adapter: the model; shapes are all that is read of it.
        window: blocks that are tuned together; 0 without block tuning.
        whole_compressed: whether end-to-end fine-tuning is to be done.
        compressed: bytes of a compressed weight.
    """
    shapes = adapter.shapes(0)
    weights = sum(rows * columns for rows, columns in shapes.values())
    widest = max(columns for _, columns in shapes.values())
    outside = list(adapter.outside_parameters())
    return StreamingMemory(
        outside=sum(4 * part.numel() if whole_compressed else part.nbytes for part in outside),
        block=(window + 1) * weights * adapter.model.dtype.itemsize
        + int(compressed * weights) * (len(adapter.blocks) if whole_compressed else 1),
        moments=int(_MOMENTS * widest * widest * _WIDE),
    )
