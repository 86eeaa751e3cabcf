"""Tokenized samples to one batch.

Shapes: B samples, T tokens of the longest, M samples with an image, H and W the height and width that the model sees.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from casp_pl.data.branches import positions
from casp_pl.data.images import load_image
from casp_pl.data.tokenize import IGNORE, Encoded, Processor, pad_token_id

PADDING = -1  # the branch that nothing else is in

__all__ = ["Collator", "load_pixels", "pad_right"]


class Collator:
    """Makes batches: right-padded input_ids, attention_mask, labels (B, T); float32 pixel_values (M, 3, H, W) if M > 0.

    Where conversations share an image also `branches`, -1 at padding, and `position_ids` (B, T), see `visible_pairs`.
    `sample_ids` lists the B ids. Other tensors of the image processor, such as image_sizes, are passed on.
    """

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.pad_id = pad_token_id(processor)

    def __call__(self, samples: Sequence[Encoded]) -> dict[str, Any]:
        """The batch of `samples`, their images decoded now.

        Raises:
            ImageRefusedError: an image that was readable when the data was set up no longer is.
        """
        batch: dict[str, Any] = {
            "input_ids": pad_right([sample.input_ids for sample in samples], self.pad_id),
            "attention_mask": pad_right([(1,) * len(sample) for sample in samples], 0),
            "labels": pad_right([sample.labels for sample in samples], IGNORE),
            "sample_ids": [sample.id for sample in samples],
        }
        if any(sample.branches for sample in samples):
            branches = [sample.branches or (0,) * len(sample) for sample in samples]
            batch["branches"] = pad_right(branches, PADDING)
            batch["position_ids"] = pad_right([positions(row) for row in branches], 0)
        return batch | load_pixels(samples, self.processor)


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """B rows of at most T numbers as one int64 tensor (B, T), filled up with `value` on the right."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def load_pixels(samples: Sequence[Encoded], processor: Processor) -> dict[str, Tensor]:
    """What the image processor makes of the samples' images, in order; empty when no sample has one."""
    images = [load_image(sample.image) for sample in samples if sample.image is not None]
    if not images:
        return {}
    output = processor.image_processor(images=images, return_tensors="pt")
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}
