"""Tokenized samples to one batch.

Shapes: B samples, T tokens of the longest, M images of all samples, H and W the height and width that the model sees.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from casp_pl.data.branches import positions
from casp_pl.data.images import load_image
from casp_pl.data.tokenize import IGNORE, Encoded, Processor, pad_token_id
from casp_pl.errors import InputError

PADDING = -1  # the branch that nothing else is in

__all__ = ["Collator", "load_pixels", "pad_right"]


class Collator:
    """Makes batches: right-padded input_ids, attention_mask, labels (B, T); float32 pixel_values (M, 3, H, W) if M > 0.

    Where images are cut into tiles, pixel_values are (M, tiles, 3, H, W), and image_sizes (M, 2) tell what of them is
    padding. Videos are pixel_values_videos (videos, frames, 3, H, W).

    Where conversations share an image also `branches`, -1 at padding, and `position_ids` (B, T), see `visible_pairs`.
    `sample_ids` lists the B ids. Other tensors of the image processor, such as image_sizes, are passed on.

    Args:
        processor: of the model.
        pad_to_multiple_of: T is rounded up to a multiple of it. The allocator and oneDNN keep memory for every shape
            that they meet: end-to-end training of the embedded model peaked at 7.6 GB with any T, at 6.3 GB with
            multiples of 16.
    """

    def __init__(self, processor: Processor, *, pad_to_multiple_of: int = 1) -> None:
        self.processor = processor
        self.pad_id = pad_token_id(processor)
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, samples: Sequence[Encoded]) -> dict[str, Any]:
        """The batch of `samples`, their images decoded now.

        Raises:
            ImageRefusedError: an image that was readable when the data was set up no longer is.
        """
        batch: dict[str, Any] = {
            "input_ids": self._padded([sample.input_ids for sample in samples], self.pad_id),
            "attention_mask": self._padded([(1,) * len(sample) for sample in samples], 0),
            "labels": self._padded([sample.labels for sample in samples], IGNORE),
            "sample_ids": [sample.id for sample in samples],
        }
        if any(sample.branches for sample in samples):
            branches = [sample.branches or (0,) * len(sample) for sample in samples]
            batch["branches"] = self._padded(branches, PADDING)
            batch["position_ids"] = self._padded([positions(row) for row in branches], 0)
        return batch | load_pixels(samples, self.processor)

    def _padded(self, rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return pad_right(rows, value, multiple=self.pad_to_multiple_of)


def pad_right(rows: Sequence[Sequence[int]], value: int, *, multiple: int = 1) -> Tensor:
    """Rows of numbers as one int64 tensor (B, T), filled up with `value` on the right to a multiple of `multiple`."""
    width = -(-max(map(len, rows)) // multiple) * multiple
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64)


def load_pixels(samples: Sequence[Encoded], processor: Processor) -> dict[str, Tensor]:
    """What the image and the video processor make of the samples' images, in order; empty when no sample has one.

    Raises:
        InputError: videos of different numbers of frames, which no batch can hold.
    """
    images = [load_image(image) for sample in samples if not sample.video for image in sample.images]
    videos = [[load_image(image) for image in sample.images] for sample in samples if sample.video]
    output: dict[str, Any] = {}
    if images:
        output |= processor.image_processor(images=images, return_tensors="pt")
    if videos:
        counts = sorted(set(map(len, videos)))
        if len(counts) > 1:
            raise InputError(f"Videos of {counts[0]} and {counts[-1]} frames in one batch: give all sources one number")
        output |= processor.video_processor(videos=videos, return_tensors="pt")
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}
