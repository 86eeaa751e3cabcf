"""What a run that streams its blocks holds in memory and on disk: one block at a time, activations here or there.

    memory = process + resident + prefetched + moments + activations + temporary

resident      the block that is worked on, in float32 and once more in bf16 where it is multiplied in bf16, beside its
              compressed copy
prefetched    the next block as it is stored, read while this one is worked on
moments       second and cross moments of the widest group, summed in float64
activations   inputs of the block from the original and from the compressed prefix, and what the groups of its linears
              read in the original: all samples where they are kept in memory, one batch where they lie on disk
temporary     the largest of: what quantizing the widest linear needs beside its result, the activations that one batch
              keeps for the backward pass of a tuning window, and the logits of a few tokens

Letters: O out, I in, N tokens.
"""

from dataclasses import dataclass

import torch

from casp_pl.pipeline.footprint import PROCESS_BYTES, BlockShape, logits_bytes
from casp_pl.pipeline.planning import Workload

__all__ = ["StreamedFootprint", "streamed_footprint"]

_HEAP_SLACK = 1.2  # streamed blocks come and go as large pieces, which the heap gives back
_FLOAT = 4
_DOUBLE = 8
_SEARCH_COPIES = (
    6  # of a linear in float32 while its codes are searched: target, padded, error, products, decoded, codes
)
_MOMENT_COPIES = 3  # second and cross in float64, and one of them in float32 or being factorised


@dataclass(frozen=True)
class StreamedFootprint:
    """Bytes of the parts in this file's legend.

    Attributes:
        process: Python and its libraries.
        resident: the block that is worked on.
        prefetched: the next one.
        moments: of the widest group.
        activations: held in memory.
        activations_on_disk: held on disk.
        temporary: the largest piece of work.
        model_on_disk: the original's blocks, where they are read from.
    """

    process: int
    resident: int
    prefetched: int
    moments: int
    activations: int
    activations_on_disk: int
    temporary: int
    model_on_disk: int

    @property
    def memory(self) -> int:
        """Bytes in memory at most."""
        held = self.resident + self.prefetched + self.moments + self.activations + self.temporary
        return self.process + int(_HEAP_SLACK * held)

    @property
    def disk(self) -> int:
        """Bytes on disk at most, the original model among them."""
        return self.activations_on_disk + self.model_on_disk


def streamed_footprint(
    shape: BlockShape,
    work: Workload,
    *,
    stored: torch.dtype,
    working: torch.dtype,
    activations_on_disk: bool,
    widest_linear: tuple[int, int],
    kept_bytes: float,
) -> StreamedFootprint:
    """Memory and disk of quantization and block tuning when one block after the other is read.

    Args:
        shape: of the model; `model_bytes` is not used.
        work: what the recipe asks for.
        stored: dtype of the blocks on disk.
        working: what blocks multiply matrices in.
        activations_on_disk: whether the inputs of blocks lie on disk between batches.
        widest_linear: (O, I) of the largest linear of a block.
        kept_bytes: see `BlockCosts.kept_bytes`.
    """
    half = working.itemsize if working != torch.float32 else 0
    block = shape.weights * (_FLOAT + half)
    window = max(1, work.tuning_window if work.tuning_epochs else 1)
    a_token = 2 * shape.hidden * _FLOAT + shape.group_inputs * working.itemsize
    all_tokens = work.tokens + work.held_back_tokens
    everything = all_tokens * a_token
    out_features, in_features = widest_linear
    return StreamedFootprint(
        process=PROCESS_BYTES,
        resident=window * (block + shape.weights // 2),
        prefetched=shape.weights * stored.itemsize,
        moments=_MOMENT_COPIES * shape.widest**2 * _DOUBLE,
        activations=2 * work.batch_tokens * a_token if activations_on_disk else everything,
        activations_on_disk=everything if activations_on_disk else 0,
        temporary=max(
            _SEARCH_COPIES * out_features * in_features * _FLOAT,
            int(window * work.batch_tokens * kept_bytes) if work.tuning_epochs else 0,
            logits_bytes(shape, work),
        ),
        model_on_disk=shape.blocks * shape.weights * stored.itemsize,
    )
