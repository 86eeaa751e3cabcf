"""What a run holds in memory at most, stage by stage, from shapes and counts.

Every stage holds the process, the original model, the batches and what its own work needs; the heap takes somewhat more
than what is in it. Letters: N tokens, I in, O out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from casp_pl.models.adapter import ModelAdapter
from casp_pl.pipeline.planning import Workload

__all__ = ["BlockShape", "kept_activations", "stage_memory", "teacher_bytes"]

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
        groups: inputs of every linear group of a block, and whether it is one linear, which may close a submodule.
        model_bytes: of the original model's parameters.
        vocabulary: rows of the output head.
        itemsize: bytes of a number that is computed with.
    """

    blocks: int
    weights: int
    hidden: int
    widest: int
    groups: tuple[tuple[int, bool], ...]
    model_bytes: int
    vocabulary: int
    itemsize: int

    @property
    def widening(self) -> int:
        """Bytes that everything but the linears takes more while a model in 16 bits is trained, see `widened`."""
        beside = self.model_bytes - self.blocks * self.weights * self.itemsize
        return beside * (_FLOAT // self.itemsize - 1)

    @classmethod
    def of(cls, adapter: ModelAdapter) -> "BlockShape":
        """The sizes of this model; only shapes are read."""
        widths = adapter.shapes(0)
        return cls(
            blocks=len(adapter.blocks),
            weights=sum(o * i for o, i in widths.values()),
            hidden=widths[adapter.linear_names[0]][1],
            widest=max(i for _, i in widths.values()),
            groups=tuple((widths[group[0]][1], len(group) == 1) for group in adapter.linear_groups),
            model_bytes=sum(parameter.nbytes for parameter in adapter.model.parameters()),
            vocabulary=adapter.head.weight.shape[0],
            itemsize=adapter.model.dtype.itemsize,
        )


def stage_memory(
    shape: BlockShape, work: Workload, dtype: torch.dtype, kept_bytes: float, codes: int
) -> dict[str, int]:
    """Bytes by stage, at their largest, without the process itself and without `kept_activations`.

    Args:
        shape: of the model.
        work: what the recipe asks of this process.
        dtype: what blocks multiply matrices in.
        kept_bytes: see `BlockCosts.kept_bytes`.
        codes: bytes of all compressed linears.
    """
    logits = 4 * min(work.batch_tokens, _LOGITS_AT_ONCE) * shape.vocabulary * _FLOAT
    dense = shape.blocks * shape.weights * shape.itemsize  # all compressed blocks, dequantized for an evaluation
    half = dtype.itemsize if dtype != torch.float32 else 0
    block = shape.weights * (_FLOAT + half)
    kept = work.batch_tokens * kept_bytes
    moments = 3 * shape.widest**2 * _DOUBLE
    window = 2 * codes * work.tuning_window // shape.blocks
    training = (1 + work.codes_change) * codes + shape.widening + logits + work.taught_bytes
    own = {
        "evaluate original": logits,
        "evaluate rtn": codes + dense + logits,
        "calibration": shape.blocks * shape.hidden**2 * _DOUBLE + 2 * shape.weights * half,
        "quantize": moments + 2 * block + codes // shape.blocks,
        "evaluate quantized": codes + dense + logits,
        "block tuning": window + work.tuning_window * kept if work.tuning_epochs else 0,
        "end to end": training + shape.blocks * kept if work.steps else 0,
        "save": codes,
    }
    return {name: int(_HEAP_SLACK * (shape.model_bytes + work.batches_bytes + size)) for name, size in own.items()}


def kept_activations(shape: BlockShape, work: Workload, dtype: torch.dtype) -> dict[str, int]:
    """Bytes by stage of what an `ActivationStore` is given and keeps at once; a stage without any is left out."""
    state = shape.hidden * _FLOAT  # of a token between two blocks: of the original, of the compressed prefix, before it
    all_tokens = work.tokens + work.held_back_tokens
    states = 3 if work.follows_original else 2
    inputs = _kept_inputs(shape.groups, work.follows_original) * dtype.itemsize
    kept = {"calibration": work.tokens * state, "quantize": work.tokens * (states * state + inputs)}
    if work.tuning_epochs:
        kept["block tuning"] = 3 * all_tokens * state
    if work.steps:
        kept["end to end"] = 2 * (work.taught_tokens + work.held_back_tokens) * state + teacher_bytes(shape, work)
    return kept


def _kept_inputs(groups: Sequence[tuple[int, bool]], follows_original: bool) -> int:
    """Inputs of a block's linear groups that `BlockQuantization.compress_block` keeps at once, of a token.

    Of the compressed block those of closing linears that were reached. Of the original those that are still to come;
    where it is not followed, what the group at work reads now.
    """
    return max(
        sum(width for width, closes in groups[: number + 1] if closes)
        + sum(width for width, _ in (groups[number:] if follows_original else groups[number : number + 1]))
        for number in range(len(groups))
    )


def teacher_bytes(shape: BlockShape, work: Workload) -> int:
    """Bytes of the original's final states that end-to-end fine-tuning is held to; they lie in the host's memory."""
    return work.counted_tokens * shape.hidden * _FLOAT if work.steps else 0
