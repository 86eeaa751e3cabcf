"""The tiny model, and batches of it with images and padding."""

from typing import Any

import pytest
import torch
from torch import Tensor

from casp_pl.models import ModelAdapter, adapt
from casp_pl.models.tiny import load_tiny

IMAGE_TOKEN, IMAGE_TOKENS = 258, 16


@pytest.fixture
def model() -> Any:
    """A tiny LLaVA of one's own."""
    return load_tiny()[0].requires_grad_(False)


@pytest.fixture
def adapter(model: Any) -> ModelAdapter:
    """Its adapter."""
    return adapt(model)


@pytest.fixture
def batches() -> list[dict[str, Any]]:
    """Two images with text of 21 and 25 tokens; then three texts of 5, 13 and 9 tokens, without images."""
    generator = torch.Generator().manual_seed(0)

    def tokens(lengths: list[int]) -> dict[str, Tensor]:
        ids = torch.randint(0, 200, (len(lengths), max(lengths)), generator=generator)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return {"input_ids": ids.masked_fill(~mask, 257), "attention_mask": mask.long()}

    images = tokens([21, 25])
    images["input_ids"][:, 3 : 3 + IMAGE_TOKENS] = IMAGE_TOKEN
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    return [images | {"pixel_values": pixels, "sample_ids": ["a", "b"]}, tokens([5, 13, 9])]
