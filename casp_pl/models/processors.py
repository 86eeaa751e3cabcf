"""Processors of original and compressed models, also of those whose video part wants torchvision where it is missing.

transformers' video processors exist with torchvision only, and LLaVA-NeXT-Video and LLaVA-OneVision have one each. All
that these two do is to resize, crop and normalise every frame, which the base of its image processors does as well.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils.import_utils import is_torchvision_available

__all__ = ["FrameProcessor", "load_processor", "without_torchvision"]

_WITH_VIDEO = {"llava_next_video": "LlavaNextVideoProcessor", "llava_onevision": "LlavaOnevisionProcessor"}
_SETTINGS_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
_LOCAL: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


class FrameProcessor(PilBackend):
    """Stands for the video processor of a processor class of transformers; its defaults are those of both classes.

    Args:
        processor: name of the processor class.
        settings: as image processors take them: size, do_center_crop, crop_size, image_mean, ...
    """

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    default_to_square = False
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(self, processor: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.video_processor_type = processor.removesuffix("Processor") + "VideoProcessor"

    def __call__(self, videos: Any, **_: Any) -> BatchFeature:  # type: ignore[override]
        """Lists of frames, the same number each, to float32 `pixel_values_videos` (videos, frames, 3, H, W)."""
        frames = [super(FrameProcessor, self).__call__(video, return_tensors="np")["pixel_values"] for video in videos]
        return BatchFeature({"pixel_values_videos": np.stack(frames)}, tensor_type="pt")

    def to_dict(self) -> dict[str, Any]:
        """The settings under the name of the class that it stands for."""
        return {key: value for key, value in super().to_dict().items() if key != "image_processor_type"}


def without_torchvision(name: str) -> Any:
    """The processor class `name` of transformers, which takes a `FrameProcessor` for a video processor as well."""
    import transformers

    original = getattr(transformers, name)

    def check(self: Any, argument_name: str, argument: Any) -> Any:
        if isinstance(argument, FrameProcessor):
            return FrameProcessor
        return original.check_argument_for_proper_class(self, argument_name, argument)

    return type(name, (original,), {"check_argument_for_proper_class": check})


def load_processor(directory: Path, model_type: str, *, takes_images: bool) -> Any:
    """The processor of a model's directory, a tokenizer for a text model. Code that comes along is never run.

    Args:
        directory: of the model.
        model_type: as its config says.
        takes_images: whether it is more than a tokenizer.

    Raises:
        OSError, ValueError, KeyError: files are missing or broken.
    """
    if not takes_images:
        return AutoTokenizer.from_pretrained(directory, **_LOCAL)
    if model_type not in _WITH_VIDEO or is_torchvision_available():
        return AutoProcessor.from_pretrained(directory, **_LOCAL)  # type: ignore[no-untyped-call]
    name = _WITH_VIDEO[model_type]
    kind = without_torchvision(name)
    settings, arguments = kind.get_processor_dict(directory, local_files_only=True)
    parts = {
        "tokenizer": AutoTokenizer.from_pretrained(directory, **_LOCAL),
        "image_processor": AutoImageProcessor.from_pretrained(directory, **_LOCAL),  # type: ignore[no-untyped-call]
        "video_processor": FrameProcessor(name, **_video_settings(directory, settings)),
    }
    return kind.from_args_and_dict([parts[part] for part in kind.get_attributes()], settings, **arguments)


def _video_settings(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    found = settings.get("video_processor")
    for name in _SETTINGS_FILES:
        if found is None and (directory / name).is_file():
            found = json.loads((directory / name).read_text(encoding="utf-8"))
    known = PilBackend.valid_kwargs.__annotations__
    return {key: value for key, value in (found or {}).items() if key in known}
