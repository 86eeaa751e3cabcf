"""One question about one image."""

from pathlib import Path
from typing import Any

import torch

from casp_pl.data.images import ImageRefusedError, load_image
from casp_pl.errors import InputError
from casp_pl.layers import materialized

__all__ = ["answer"]


@torch.no_grad()
def answer(model: Any, processor: Any, image: Path, question: str, *, max_new_tokens: int = 32) -> str:
    """The model's greedy answer.

    Raises:
        InputError: the image is missing or cannot be read.
    """
    if not image.is_file():
        raise InputError(f"--image {image}: no such file.")
    try:
        picture = load_image(image)
    except ImageRefusedError as error:
        raise InputError(f"--image {image}: {error}") from error
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[picture], text=[prompt], return_tensors="pt").to(next(model.parameters()).device)
    with materialized(model):
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return str(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]).strip()
