"""A conversation that goes on: messages for the chat template, and the tensors that `generate` takes."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from casp_pl.data.tokenize import Processor, takes_images, tokenizer_of
from casp_pl.errors import ConfigError, InputError

__all__ = ["chat_inputs", "message"]


def message(processor: Processor, role: str, text: str, *, images: int = 0) -> dict[str, Any]:
    """One turn in the form that the processor's chat template takes, `images` images in front of its text.

    Raises:
        InputError: there are images and the model takes none.
    """
    if not hasattr(processor, "tokenizer"):
        if images:
            raise InputError("There is an image, but the model takes text alone.")
        return {"role": role, "content": text}
    if images and not takes_images(processor):
        raise InputError("There is an image, but the model takes text alone.")
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def chat_inputs(processor: Processor, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image]) -> Any:
    """input_ids (1, T) up to where the answer starts, attention_mask, and what the image processor makes of the images.

    Args:
        processor: processor or tokenizer with a chat template.
        messages: as `message` makes them.
        images: all images of the conversation, in order.

    Raises:
        ConfigError: there is no chat template.
    """
    if not getattr(processor, "chat_template", None):
        raise ConfigError("The processor has no chat template: a conversation cannot be put into tokens")
    text = processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    start = tokenizer_of(processor).bos_token
    settings = {"add_special_tokens": not (start and text.startswith(start)), "return_tensors": "pt"}
    if images:
        return processor(images=list(images), text=[text], **settings)
    return processor(text=[text], **settings)
