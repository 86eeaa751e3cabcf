"""Samples to tokens: the processor's chat template, image tokens, and labels on the answers only.

A processor here is a `LlavaProcessor` (or one like it: `.tokenizer`, `.image_token_id`, callable on images and text)
or, for models without images, a plain tokenizer. It must be a fast one: labels are found by character offsets.
Labels follow the convention of transformers: `labels[t]` equals `input_ids[t]` where the loss is taken, -100 elsewhere;
the model shifts them by one itself.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from PIL import Image

from casp_pl.data.images import ImageSource, load_image
from casp_pl.data.sample import IMAGE_MARK, Sample
from casp_pl.errors import ConfigError, InputError

__all__ = [
    "IGNORE",
    "Counted",
    "Encoded",
    "Processor",
    "count_image_tokens",
    "encode_prompt",
    "encode_sample",
    "encode_windows",
    "image_tokens_of",
    "pad_token_id",
    "picture_token_id",
    "takes_images",
    "takes_videos",
    "tokenizer_of",
    "truncate",
]

IGNORE = -100

Counted: TypeAlias = Literal["answers", "all"]
"""Which tokens of a conversation get labels: those of the answers, or all but the first and those of images."""

Processor: TypeAlias = Any
"""A LlavaProcessor or a tokenizer; transformers has no common type with the calls made here."""


@dataclass(frozen=True)
class Encoded:
    """A tokenized sample; its images are decoded only when a batch is made of it.

    Attributes:
        id: id of the sample.
        input_ids: T token ids, image tokens expanded.
        labels: T labels, `IGNORE` where no loss is taken.
        images: of the sample, in the order of their tokens.
        image_tokens: how many of the T tokens stand for images.
        video: whether the images are the frames of one video to the model.
        branches: where conversations share their images (`join_branches`), T numbers: 0 in the shared start, then the
            number of the conversation; empty for a single one.
    """

    id: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    images: tuple[ImageSource, ...] = ()
    image_tokens: int = 0
    branches: tuple[int, ...] = ()
    video: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)


def tokenizer_of(processor: Processor) -> Any:
    """The tokenizer of a processor; a tokenizer is returned as it is."""
    return getattr(processor, "tokenizer", processor)


def takes_images(processor: Processor) -> bool:
    """Whether samples may have images: True for processors, False for plain tokenizers."""
    return hasattr(processor, "image_token_id")


def takes_videos(processor: Processor) -> bool:
    """Whether the model knows videos; others can be given their frames as images."""
    return getattr(processor, "video_token_id", None) is not None


def pad_token_id(processor: Processor) -> int:
    """The padding token, or the end token, or 0. Padding is masked, so any token would do."""
    tokenizer = tokenizer_of(processor)
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def count_image_tokens(processor: Processor, image: Image.Image | list[Image.Image]) -> int:
    """Number of tokens that the processor puts in the place of the mark; 0 for plain tokenizers.

    LLaVA-NeXT's depends on the image: on the tiles that it is cut into, and on what of them is padding.

    Args:
        processor: of the model.
        image: the image, or the frames of a video.
    """
    if not takes_images(processor):
        return 0
    given: dict[str, Any]
    if isinstance(image, list):
        mark, token_id, given = processor.video_token, processor.video_token_id, {"videos": [image]}
    else:
        mark, token_id, given = processor.image_token, processor.image_token_id, {"images": [image]}
    tokens = processor(text=[mark], add_special_tokens=False, **given)["input_ids"][0]
    return sum(int(token) == token_id for token in tokens)


def image_tokens_of(sample: Sample, processor: Processor) -> list[int]:
    """Number of tokens of each image of the sample, or of its video; they are decoded for it.

    Raises:
        ImageRefusedError: one of them cannot be used.
    """
    sample = _as_the_model_sees_it(sample, processor)
    images = [load_image(image) for image in sample.images]
    return [count_image_tokens(processor, image) for image in ([images] if sample.video else images)]


def picture_token_id(processor: Processor, sample: "Sample | Encoded") -> int | None:
    """The token that stands for a part of the sample's images, or of its video."""
    name = "video_token_id" if sample.video else "image_token_id"
    token: int | None = getattr(processor, name, None)
    return token


def _as_the_model_sees_it(sample: Sample, processor: Processor) -> Sample:
    """Frames of a video as images where the model knows no videos, else as one video of one mark, with all its frames.

    A batch needs as many frames of each video, so a short one repeats some.
    """
    if not sample.video or not takes_videos(processor):
        return replace(sample, video=0)
    count, marks = sample.video, IMAGE_MARK * len(sample.images)
    frames = tuple(sample.images[number * len(sample.images) // count] for number in range(count))
    turns = tuple(replace(turn, question=turn.question.replace(marks, IMAGE_MARK)) for turn in sample.turns)
    return replace(sample, images=frames, turns=turns)


def encode_sample(
    sample: Sample, processor: Processor, *, image_tokens: int | Sequence[int] = 0, counted: Counted = "answers"
) -> Encoded:
    """The whole sample, untruncated: labels on the answers with their end tokens, or on a plain text but its start.

    Args:
        sample: a conversation or plain text.
        processor: processor or tokenizer with a chat template.
        image_tokens: number of tokens of each image (`image_tokens_of`), or one number for all.
        counted: "all" labels questions, too.

    Raises:
        InputError: the number of `<image>` marks is not that of the images, or the processor takes no images.
        ConfigError: there is no chat template, or it does not build a conversation turn by turn.
    """
    if sample.text is not None:
        ids, _ = _tokenize(sample, sample.text, processor, ())
        return Encoded(sample.id, tuple(ids), (IGNORE, *ids[1:]))
    sample = _as_the_model_sees_it(sample, processor)
    messages = _messages(sample, processor)
    text = _render(processor, messages)
    each = _tokens_of_each(sample, image_tokens)
    ids, offsets = _tokenize(sample, text, processor, each)
    if counted == "all":
        image_token = picture_token_id(processor, sample)
        labels = [IGNORE, *(IGNORE if token == image_token else token for token in ids[1:])]
    else:
        spans = [_answer_span(text, messages, turn, processor) for turn in range(len(sample.turns))]
        labels = [
            token if any(start < span_end and end > span_start for span_start, span_end in spans) else IGNORE
            for token, (start, end) in zip(ids, offsets, strict=True)
        ]
    return Encoded(sample.id, tuple(ids), tuple(labels), sample.images, sum(each), video=bool(sample.video))


def encode_prompt(sample: Sample, processor: Processor, *, image_tokens: int | Sequence[int] = 0) -> Encoded:
    """The first question up to where the assistant's answer starts; no labels. Arguments as `encode_sample`."""
    sample = _as_the_model_sees_it(sample, processor)
    text = _render(processor, _messages(sample, processor)[:1], add_generation_prompt=True)
    each = _tokens_of_each(sample, image_tokens)
    ids, _ = _tokenize(sample, text, processor, each)
    return Encoded(sample.id, tuple(ids), (IGNORE,) * len(ids), sample.images, sum(each), video=bool(sample.video))


def encode_windows(samples: Iterable[Sample], processor: Processor, *, length: int) -> Iterator[Encoded]:
    """Plain texts, one after another, cut into windows of exactly `length` tokens; the rest at the end is dropped.

    Tokenizers that start every text with a token (LLaMA's `<s>`) get it at the start of each window.
    """
    tokenizer = tokenizer_of(processor)
    probe = tokenizer("a")["input_ids"]
    start = [probe[0]] if len(probe) > 1 and probe[0] == tokenizer.bos_token_id else []
    fresh = length - len(start)
    buffer: list[int] = []
    number = 0
    for sample in samples:
        if sample.text is None:
            raise InputError(f"Sample {sample.id} is a conversation, text windows are made of plain texts alone")
        ids, _ = _tokenize(sample, f"{sample.text}\n\n", processor, ())
        buffer += ids[len(start) :]
        while len(buffer) >= fresh:
            window = (*start, *buffer[:fresh])
            buffer = buffer[fresh:]
            yield Encoded(f"text/{number:05d}", window, (IGNORE, *window[1:]))
            number += 1


def truncate(encoded: Encoded, max_length: int, image_token_id: int | None = None) -> Encoded | None:
    """The first `max_length` tokens, or None if no label is left among them or an image lies behind them."""
    if len(encoded) <= max_length:
        return encoded
    if image_token_id in encoded.input_ids[max_length:]:
        return None
    labels = encoded.labels[:max_length]
    if all(label == IGNORE for label in labels):
        return None
    return replace(encoded, input_ids=encoded.input_ids[:max_length], labels=labels)


def _messages(sample: Sample, processor: Processor) -> list[dict[str, Any]]:
    """The conversation as the chat template wants it: parts for processors, strings for plain tokenizers."""
    if sample.images and not takes_images(processor):
        raise InputError(f"Sample {sample.id} has an image, but the model takes none: set text_ratio to 1")
    marked = any(IMAGE_MARK in turn.question for turn in sample.turns)
    messages = []
    for number, turn in enumerate(sample.turns):
        for role, text in (("user", turn.question), ("assistant", turn.answer)):
            content: Any = text
            if hasattr(processor, "tokenizer"):
                kind = "video" if sample.video else "image"
                in_front = 0 if marked or number or role == "assistant" else _pictures(sample)
                parts = _parts(text, kind) if sample.images and role == "user" else [{"type": "text", "text": text}]
                content = [{"type": kind} for _ in range(in_front)] + parts
            messages.append({"role": role, "content": content})
    return messages


def _pictures(sample: Sample) -> int:
    """How many marks the sample needs."""
    return 1 if sample.video else len(sample.images)


def _parts(question: str, kind: str) -> list[dict[str, str]]:
    """Texts and images of a question in their order; templates break the line behind an image themselves."""
    first, *rest = question.split(IMAGE_MARK)
    parts = [{"type": "text", "text": first}] if first or not rest else []
    for text in rest:
        parts.append({"type": kind})
        if text.strip():
            parts.append({"type": "text", "text": text.removeprefix("\n")})
    return parts


def _tokens_of_each(sample: Sample, image_tokens: int | Sequence[int]) -> tuple[int, ...]:
    """Tokens of every image of the sample."""
    return (image_tokens,) * _pictures(sample) if isinstance(image_tokens, int) else tuple(image_tokens)


def _render(processor: Processor, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
    if not getattr(processor, "chat_template", None):
        raise ConfigError("The processor has no chat template: use one with a template, or a text source alone")
    return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))


def _answer_span(text: str, messages: list[dict[str, Any]], turn: int, processor: Processor) -> tuple[int, int]:
    """First and last (exclusive) character of an answer and its end token in the rendered conversation."""
    question = _render(processor, messages[: 2 * turn + 1], add_generation_prompt=True)
    answered = _render(processor, messages[: 2 * turn + 2])
    if not (text.startswith(answered) and answered.startswith(question)):
        raise ConfigError("The chat template does not build a conversation turn by turn: answers cannot be located")
    return len(question), len(answered.rstrip())


def _tokenize(
    sample: Sample, text: str, processor: Processor, image_tokens: Sequence[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and their character offsets, each image token repeated as often as its image has tokens."""
    tokenizer = tokenizer_of(processor)
    if not tokenizer.is_fast:
        raise ConfigError(f"{type(tokenizer).__name__} gives no character offsets: use a fast tokenizer")
    templated = bool(sample.turns) and tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    output = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(output["input_ids"]), list(output["offset_mapping"])
    image_token = picture_token_id(processor, sample)
    marks = [getattr(processor, name, None) for name in ("image_token_id", "video_token_id")]
    places = [place for place, token in enumerate(ids) if token is not None and token in marks]
    if len(places) != _pictures(sample):
        raise InputError(f"Sample {sample.id}: {len(places)} image marks in the text, but {_pictures(sample)} images")
    for place, count in reversed(list(zip(places, image_tokens, strict=True))):
        ids[place : place + 1] = [image_token] * count
        offsets[place : place + 1] = [offsets[place]] * count
    return ids, offsets
