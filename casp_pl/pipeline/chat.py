"""`predict`: one question or a conversation, answers shown while they are made; in a terminal and piped."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, TextIO, TypeAlias, TypeVar

import torch
from PIL import Image
from transformers import TextStreamer

from casp_pl.checkpoint import load_compressed
from casp_pl.data.chat import chat_inputs, message
from casp_pl.data.images import ImageRefusedError, load_image
from casp_pl.data.tokenize import Processor, tokenizer_of
from casp_pl.data.video import FRAMES, video_frames
from casp_pl.errors import InputError
from casp_pl.pipeline.prepare import model_device, prepare
from casp_pl.pipeline.settings import RunSettings
from casp_pl.pipeline.side_by_side import model_directory, require_original_of_run

__all__ = ["Conversation", "Models", "open_conversations", "read_questions"]

T = TypeVar("T")

Models: TypeAlias = Literal["both", "original", "compressed"]


class Conversation:
    """A model that remembers what it was asked and what it answered.

    Args:
        name: stands in front of every answer; empty for nothing.
        model: decodes greedily, its layers as they are stored.
        processor: its processor or tokenizer.
        image: what the conversation is about; None for text alone, or a video.
        video: the frames of the video that it is about.
        max_new_tokens: longest answer.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        processor: Processor,
        image: Image.Image | None,
        *,
        max_new_tokens: int,
        video: Sequence[Image.Image] = (),
    ) -> None:
        self.name = name
        self.model = model
        self.processor = processor
        self.images = [] if image is None else [image]
        self.videos = [video] if video else []
        self.max_new_tokens = max_new_tokens
        self.messages: list[dict[str, Any]] = []

    @torch.no_grad()
    def ask(self, question: str, out: IO[str]) -> str:
        """The answer, written to `out` word by word; what the console could not decode of `question` is read as UTF-8.

        Raises:
            InputError: there is an image or a video and the model takes none.
        """
        question = question.encode(errors="surrogateescape").decode(errors="replace")
        shown = {} if self.messages else {"images": len(self.images), "videos": len(self.videos)}
        self.messages.append(message(self.processor, "user", question, **shown))
        inputs = chat_inputs(self.processor, self.messages, self.images, self.videos)
        inputs = inputs.to(next(self.model.parameters()).device)
        if self.name:
            print(f"{self.name}: ", end="", file=out, flush=True)
        streamer = _Words(tokenizer_of(self.processor), out)
        tokens = self.model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, streamer=streamer, pad_token_id=0
        )
        fresh = tokens[0, inputs["input_ids"].shape[1] :]
        answer = str(tokenizer_of(self.processor).decode(fresh, skip_special_tokens=True)).strip()
        self.messages.append(message(self.processor, "assistant", answer))
        return answer


class _Words(TextStreamer):
    """Writes whole words as soon as they are there."""

    def __init__(self, tokenizer: Any, out: IO[str]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Transformers calls it with every piece of text."""
        print(text, end="\n" if stream_end else "", file=self.out, flush=True)


def open_conversations(
    settings: RunSettings,
    *,
    image: Path | None,
    video: Path | None,
    models: Models | None,
    model_dir: Path | None,
    max_new_tokens: int,
) -> list[Conversation]:
    """One conversation a model; what is not asked for is not loaded.

    Args:
        settings: the recipe.
        image: what the conversation is about, if anything.
        video: the same, a file or a folder of frames.
        models: who answers; None for both, but only the compressed model where `model_dir` is given.
        model_dir: a compressed model, or a run that has one; None for that of the recipe's run.
        max_new_tokens: longest answer.

    Raises:
        InputError: the image, the video or a model is missing or cannot be read.
        ConfigError: the recipe's model is not the one that its run compressed.
    """
    shown: dict[str, Any] = {"image": None if image is None else _read("--image", image, lambda: load_image(image))}
    if video is not None:
        shown["video"] = _read("--video", video, lambda: [load_image(frame) for frame in video_frames(video, FRAMES)])
    asked = models or ("both" if model_dir is None else "compressed")
    directory = None if asked == "original" else _compressed(settings, model_dir)
    talks = []
    if asked != "compressed":
        beside = directory is not None and model_dir is None
        prepared = prepare(settings, digest=beside)
        if beside:
            require_original_of_run(settings, prepared)
        model, processor = prepared.adapter.model, prepared.processor
        talks.append(Conversation("original", model, processor, max_new_tokens=max_new_tokens, **shown))
    if directory is not None:
        model, processor = load_compressed(directory, device=model_device(settings))
        talks.append(Conversation("compressed", model, processor, max_new_tokens=max_new_tokens, **shown))
    return talks


def _compressed(settings: RunSettings, model_dir: Path | None) -> Path:
    if model_dir is None:
        return model_directory(settings)
    inner = model_dir / "model"
    return inner if inner.is_dir() else model_dir


def read_questions(source: TextIO, out: IO[str]) -> Iterator[str]:
    """The lines of `source` that are not blank; from a terminal, with a prompt, until a blank one or Ctrl-D."""
    terminal = source.isatty()
    if terminal:
        print("Ask; an empty line ends the conversation.", file=out)
    while True:
        if terminal:
            print("> ", end="", file=out, flush=True)
        line = source.readline()
        if not line or (terminal and not line.strip()):
            return
        if line.strip():
            yield line.strip()


def _read(option: str, path: Path, load: Callable[[], T]) -> T:
    if not path.exists():
        raise InputError(f"{option} {path}: no such file.")
    try:
        return load()
    except ImageRefusedError as error:
        raise InputError(f"{option} {path}: {error}") from error
