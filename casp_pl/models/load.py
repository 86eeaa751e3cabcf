"""One place that turns a name into a model: the embedded demo, the tiny random model, or a Hugging Face directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from casp_pl.errors import ConfigError, InputError
from casp_pl.models.adapter import ModelAdapter, adapt
from casp_pl.models.demo import load_demo, load_processor, load_tokenizer
from casp_pl.models.hub import hub_directory, hub_label
from casp_pl.models.memory import Memory, has_room
from casp_pl.models.original import check_config, check_original
from casp_pl.models.streamed import load_streamed
from casp_pl.models.tiny import load_tiny

__all__ = ["ModelSource", "explained", "factory_and_processor", "load_model"]

_OWN = ("embedded", "embedded-text", "tiny")


class ModelSource:
    """Where a model comes from.

    Args:
        source: `embedded` (SmolLM2 with a vision tower, comes with the package), `embedded-text` (SmolLM2 alone),
            `tiny` (random, for tests), or a directory or hub name of a model of the LLaVA family or LLaMA type.
        revision: branch, tag or commit of a hub name, to pin it; null takes the main branch as it is now.
        dtype: the type that everything is computed in; on a CPU float32 is by far the fastest.
        streaming: whether the decoder blocks stay on disk and are read one at a time; null does so where the model
            does not fit into free memory comfortably (`streams`). The results are the same.

    Raises:
        ConfigError: a revision of a model that is not on the hub.
    """

    def __init__(
        self,
        *,
        source: str = "embedded",
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        streaming: bool | None = None,
    ) -> None:
        if revision is not None and (source in _OWN or Path(source).is_dir()):
            raise ConfigError(f"model.revision: '{source}' is no hub name: only these have revisions.")
        self.source = source
        self.revision = revision
        self.dtype = dtype
        self.streaming = streaming

    @property
    def label(self) -> str:
        """The source and, where it is pinned, its revision."""
        return hub_label(self.source, self.revision)

    def directory(self, *, weights: bool = True) -> Path:
        """Where the model's files lie, fetched from the hub if need be; without `weights` all but these is fetched.

        Raises:
            InputError: there is no such model, or no way to reach it.
        """
        if Path(self.source).is_dir():
            return Path(self.source)
        if Path(self.source).exists() or self.source.count("/") != 1:
            raise InputError(
                f"model.source: '{self.source}' is neither embedded, tiny, a directory, nor a hub name like org/name."
            )
        return hub_directory(self.source, revision=self.revision, weights=weights)

    def open(self, device: torch.device, *, streamed: bool = False) -> ModelAdapter:
        """The adapter of the model on a device, in memory or streamed.

        Raises:
            InputError: the model cannot be found or read.
            IntegrityError: its files are broken or unsafe to read.
        """
        if not streamed:
            return adapt(self.load()[0].to(device))
        directory = self.directory()
        check_original(directory)
        factory, _ = factory_and_processor(self.source, directory)
        return load_streamed(directory, factory, dtype=getattr(torch, self.dtype), device=device)

    def streams(self, weight_bytes: int, free: Memory | None) -> bool:
        """Whether a run leaves the decoder blocks of this model on disk.

        Args:
            weight_bytes: of all weights in memory.
            free: for each process, before any weight is loaded; None where nobody knows, and it may be enough.

        Raises:
            ConfigError: it is to be streamed, but cannot be.
        """
        if self.source in _OWN:
            if self.streaming:
                raise ConfigError(f"model.streaming: '{self.source}' has no files to read from; set it to false.")
            return False
        if self.streaming is not None:
            return self.streaming
        return free is not None and not has_room(weight_bytes, free)

    def load(self) -> tuple[Any, Any]:
        """A frozen model in evaluation mode and its processor (a tokenizer for a text model).

        Raises:
            InputError: the model cannot be found or read.
            IntegrityError: its files are broken or unsafe to read.
        """
        dtype = getattr(torch, self.dtype)
        model: Any
        processor: Any
        if self.source == "tiny":
            model, processor = load_tiny()
        elif self.source in ("embedded", "embedded-text"):
            model, processor = load_demo(text_only=self.source == "embedded-text")
        else:
            model, processor = _load_hugging_face(self.source, self.directory(), dtype)
        for parameter in model.parameters():  # not buffers: rotary embeddings need their frequencies in float32
            parameter.data = parameter.data.to(dtype)
        return model.eval().requires_grad_(False), processor

    def load_processor(self) -> Any:
        """The processor alone (a tokenizer for a text model), without reading the weights.

        Raises:
            InputError: it cannot be found or read.
        """
        if self.source == "tiny":
            return load_tiny()[1]
        if self.source in ("embedded", "embedded-text"):
            return load_processor() if self.source == "embedded" else load_tokenizer()
        directory = self.directory()
        check_config(directory)
        return factory_and_processor(self.source, directory)[1]


def load_model(source: str = "embedded") -> tuple[Any, Any]:
    """`ModelSource(source=source).load()`: a frozen fp32 model and its processor."""
    return ModelSource(source=source).load()


def _load_hugging_face(source: str, directory: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    check_original(directory)
    factory, processor = factory_and_processor(source, directory)
    settings: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True, "use_safetensors": True}
    with explained(source):
        model, loading = factory.from_pretrained(directory, dtype=dtype, output_loading_info=True, **settings)
    lost = sorted(str(entry) for what in ("missing_keys", "mismatched_keys") for entry in loading[what])
    if lost:
        raise InputError(
            f"model.source: '{source}' lacks {len(lost)} weights of a {type(model).__name__}, the first is {lost[0]}."
        )
    return model, processor


def factory_and_processor(source: str, directory: Path) -> tuple[Any, Any]:
    """The Auto class of the model, and its processor or tokenizer."""
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    from casp_pl.models.processors import load_processor as processor_in

    with explained(source):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        processor = processor_in(directory, config.model_type, takes_images=multimodal)
    return AutoModelForImageTextToText if multimodal else AutoModelForCausalLM, processor


@contextmanager
def explained(source: str) -> Iterator[None]:
    """Turns what goes wrong in reading a model into one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"model.source: cannot load '{source}': {reason}") from error
