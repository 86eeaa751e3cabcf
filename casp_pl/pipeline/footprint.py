"""What a run holds in memory at most, stage by stage, from shapes and counts.

Every stage holds the process, the original model and what its own work needs; the heap takes somewhat more than what is
in it. Letters: N tokens, I in, O out.
"""

from dataclasses import dataclass

import torch

from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.memory import PROCESS_BYTES
from casp_pl.pipeline.planning import Workload

__all__ = ["BlockShape", "stage_memory"]

_HEAP_SLACK = 1.38  # what the heap takes for what is in it; fitted to whole runs with AQLM and GPTQ
_FLOAT = 4
_DOUBLE = 8
_LOGITS_AT_ONCE = 128  # tokens, see `head_divergence`


@dataclass(frozen=True)
class BlockShape:
    """The sizes of a model that its memory depends on.

    Attributes:
        blocks: number of decoder blocks.
        weights: of the linears of one block.
        hidden: width of the residual stream.
        widest: largest number of inputs of a linear.
        group_inputs: inputs of the linear groups of one block, together.
        model_bytes: of the original model's parameters.
        vocabulary: rows of the output head.
    """

    blocks: int
    weights: int
    hidden: int
    widest: int
    group_inputs: int
    model_bytes: int
    vocabulary: int

    @classmethod
    def of(cls, adapter: ModelAdapter) -> "BlockShape":
        """The sizes of this model; only shapes are read."""
        widths = adapter.shapes(0)
        return cls(
            blocks=len(adapter.blocks),
            weights=sum(o * i for o, i in widths.values()),
            hidden=widths[adapter.linear_names[0]][1],
            widest=max(i for _, i in widths.values()),
            group_inputs=sum(widths[group[0]][1] for group in adapter.linear_groups),
            model_bytes=sum(parameter.nbytes for parameter in adapter.model.parameters()),
            vocabulary=adapter.head.weight.shape[0],
        )


def stage_memory(shape: BlockShape, work: Workload, dtype: torch.dtype, kept_bytes: float) -> dict[str, int]:
    """Bytes of the process by stage, at their largest.

    Args:
        shape: of the model.
        work: what the recipe asks for.
        dtype: what blocks multiply matrices in.
        kept_bytes: see `BlockCosts.kept_bytes`.
    """
    all_tokens = work.tokens + work.held_back_tokens
    codes = shape.blocks * shape.weights // 2  # at most 4 bits a weight, in memory until the end
    logits = 4 * min(work.batch_tokens, _LOGITS_AT_ONCE) * shape.vocabulary * _FLOAT
    dense = shape.blocks * shape.weights * _FLOAT  # all compressed blocks, dequantized for an evaluation
    half = dtype.itemsize if dtype != torch.float32 else 0
    block = shape.weights * (_FLOAT + half)
    kept = work.batch_tokens * kept_bytes
    streams = 3 * all_tokens * shape.hidden * _FLOAT
    references = work.tokens * shape.group_inputs * dtype.itemsize
    moments = 3 * shape.widest**2 * _DOUBLE
    own = {
        "evaluate original": logits,
        "evaluate rtn": codes + dense + logits,
        "calibration": shape.blocks * shape.hidden**2 * _DOUBLE + 2 * shape.weights * half,
        "quantize": codes + streams + references + moments + 2 * block,
        "evaluate quantized": codes + dense + logits,
        "block tuning": 2 * codes + streams + work.tuning_window * kept if work.tuning_epochs else 0,
        "end to end": 2 * codes + shape.blocks * kept + logits if work.steps else 0,
        "save": 2 * codes,
    }
    return {name: PROCESS_BYTES + int(_HEAP_SLACK * (shape.model_bytes + size)) for name, size in own.items()}
