"""A conversation that goes on: messages for the chat template, and the tensors that `generate` takes."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from casp_pl.data.tokenize import Processor, takes_images, takes_videos, tokenizer_of
from casp_pl.errors import ConfigError, InputError

__all__ = ["chat_inputs", "message"]


def message(processor: Processor, role: str, text: str, *, images: int = 0, videos: int = 0) -> dict[str, Any]:
    """One turn in the form that the processor's chat template takes, images and videos in front of its text.

    Raises:
        InputError: there are images or videos and the model takes none.
    """
    if (images or videos) and not takes_images(processor):
        raise InputError(f"There is {'an image' if images else 'a video'}, but the model takes text alone.")
    if videos and not takes_videos(processor):
        raise InputError("There is a video, but the model takes text and images alone.")
    if not hasattr(processor, "tokenizer"):
        return {"role": role, "content": text}
    shown = [{"type": "image"}] * images + [{"type": "video"}] * videos
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}


def chat_inputs(
    processor: Processor,
    messages: Sequence[dict[str, Any]],
    images: Sequence[Image.Image],
    videos: Sequence[Sequence[Image.Image]] = (),
) -> Any:
    """input_ids (1, T) up to where the answer starts, attention_mask, and what the processor makes of what is shown.

    Args:
        processor: processor or tokenizer with a chat template.
        messages: as `message` makes them.
        images: all images of the conversation, in order.
        videos: the frames of each video of the conversation, in order.

    Raises:
        ConfigError: there is no chat template.
    """
    if not getattr(processor, "chat_template", None):
        raise ConfigError("The processor has no chat template: a conversation cannot be put into tokens")
    text = processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    start = tokenizer_of(processor).bos_token
    settings = {"add_special_tokens": not (start and text.startswith(start)), "return_tensors": "pt"}
    shown = {"images": list(images), "videos": [list(frames) for frames in videos]}
    return processor(text=[text], **{kind: given for kind, given in shown.items() if given}, **settings)
