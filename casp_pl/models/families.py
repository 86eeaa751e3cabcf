"""A tiny random model of each supported class, with its processor: for tests and benchmarks, nothing to download.

What the classes differ in is there: tiles and frames of images, grouped queries, biases of q, k and v, norms of queries
and keys, tied and untied embeddings, sliding windows in all blocks (Mistral) and in some (Qwen2).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from casp_pl.models.demo.llava import CHAT_TEMPLATE
from casp_pl.models.processors import FrameProcessor, without_torchvision
from casp_pl.models.tiny import byte_tokenizer

__all__ = ["FAMILIES", "build_family", "write_family"]

_SIZE, _PATCH = 16, 4  # of a tile: 4 x 4 patches
_TILES = [[_SIZE, 2 * _SIZE], [2 * _SIZE, _SIZE], [2 * _SIZE, 2 * _SIZE]]
_SPECIAL = ("<|im_start|>", "<|im_end|>", "<image>", "<video>")
_TEMPLATE = CHAT_TEMPLATE.replace(
    "{% else %}{{ part['text'] }}",
    "{% elif part['type'] == 'video' %}{{ '<video>\n' }}{% else %}{{ part['text'] }}",
)
_WINDOW = 24


def build_family(name: str, seed: int = 0) -> tuple[Any, Any]:
    """A model of the class `name`, one of `FAMILIES`, in evaluation mode, and its processor or tokenizer."""
    tokenizer = byte_tokenizer(_SPECIAL, _TEMPLATE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = FAMILIES[name](tokenizer)
        for parameter in model.parameters():
            # 0.02 would leave the blocks without any influence at this width, zeros and ones would hide what they do
            parameter.data.mul_(5.0) if parameter.dim() > 1 else parameter.data.add_(0.1 * torch.randn_like(parameter))
            parameter.data.copy_(parameter.data.half())
    end = tokenizer.eos_token_id
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    return model.eval(), processor


def write_family(name: str, directory: Path, seed: int = 0) -> None:
    """`build_family` as a directory of a checkpoint as one finds it on the hub: weights, processor, configs."""
    model, processor = build_family(name, seed)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def _text(kind: str, tokenizer: Any, **settings: Any) -> Any:
    import transformers

    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=start, eos_token_id=end, pad_token_id=end, dtype="float32", **settings,
    )  # fmt: skip


def _clip() -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=_SIZE,
        patch_size=_PATCH, projection_dim=16,
    )  # fmt: skip


def _special(tokenizer: Any, **settings: Any) -> dict[str, Any]:
    vocabulary = tokenizer.get_vocab()
    return {"image_token_index": vocabulary["<image>"], "tie_word_embeddings": False, "dtype": "float32"} | settings


def _square() -> dict[str, Any]:
    return {"size": {"height": _SIZE, "width": _SIZE}, "crop_size": {"height": _SIZE, "width": _SIZE}}


def _llava(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    config: Any = LlavaConfig(vision_config=_clip(), text_config=_text("Llama", tokenizer), **_special(tokenizer))
    processor = LlavaProcessor(  # type: ignore[no-untyped-call]
        CLIPImageProcessor(**_square(), do_center_crop=False), tokenizer, patch_size=_PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=_TEMPLATE,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def _tiled(image_processor: str) -> Any:
    import transformers

    return getattr(transformers, image_processor)(
        size={"shortest_edge": _SIZE}, crop_size={"height": _SIZE, "width": _SIZE}, image_grid_pinpoints=_TILES
    )


def _llava_next(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor

    text = _text("Mistral", tokenizer, sliding_window=None)
    config: Any = LlavaNextConfig(
        vision_config=_clip(), text_config=text, image_grid_pinpoints=_TILES, **_special(tokenizer)
    )
    processor = LlavaNextProcessor(  # type: ignore[no-untyped-call]
        _tiled("LlavaNextImageProcessor"), tokenizer, patch_size=_PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=_TEMPLATE,
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config), processor


def _llava_next_video(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    config: Any = LlavaNextVideoConfig(
        vision_config=_clip(), text_config=_text("Llama", tokenizer), image_grid_pinpoints=_TILES,
        **_special(tokenizer, video_token_index=tokenizer.get_vocab()["<video>"]),
    )  # fmt: skip
    processor = without_torchvision("LlavaNextVideoProcessor")(
        FrameProcessor("LlavaNextVideoProcessor", do_center_crop=True, **_square()),
        _tiled("LlavaNextImageProcessor"), tokenizer, patch_size=_PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=_TEMPLATE,
    )  # fmt: skip
    return LlavaNextVideoForConditionalGeneration(config), processor


def _llava_onevision(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=_SIZE,
        patch_size=_PATCH, vision_use_head=False,
    )  # fmt: skip
    text = _text("Qwen2", tokenizer, tie_word_embeddings=True)
    config: Any = LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_grid_pinpoints=_TILES, **_special(
            tokenizer, video_token_index=tokenizer.get_vocab()["<video>"], tie_word_embeddings=True
        ),
    )  # fmt: skip
    processor = without_torchvision("LlavaOnevisionProcessor")(
        _onevision_tiles(), tokenizer,
        FrameProcessor("LlavaOnevisionProcessor", do_center_crop=False, **_square()),
        num_image_tokens=(_SIZE // _PATCH) ** 2, vision_feature_select_strategy="full", chat_template=_TEMPLATE,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config), processor


def _onevision_tiles() -> Any:
    from transformers import LlavaOnevisionImageProcessor

    return LlavaOnevisionImageProcessor(size={"height": _SIZE, "width": _SIZE}, image_grid_pinpoints=_TILES)


def _language(kind: str, **settings: Any) -> Callable[[Any], tuple[Any, Any]]:
    def build(tokenizer: Any) -> tuple[Any, Any]:
        import transformers

        return getattr(transformers, f"{kind}ForCausalLM")(_text(kind, tokenizer, **settings)), tokenizer

    return build


FAMILIES: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "LlavaForConditionalGeneration": _llava,
    "LlavaNextForConditionalGeneration": _llava_next,
    "LlavaNextVideoForConditionalGeneration": _llava_next_video,
    "LlavaOnevisionForConditionalGeneration": _llava_onevision,
    "LlamaForCausalLM": _language("Llama", tie_word_embeddings=False),
    "MistralForCausalLM": _language("Mistral", tie_word_embeddings=False, sliding_window=_WINDOW),
    "Qwen2ForCausalLM": _language(
        "Qwen2", tie_word_embeddings=True, use_sliding_window=True, sliding_window=_WINDOW, max_window_layers=1
    ),
    "Qwen3ForCausalLM": _language("Qwen3", tie_word_embeddings=True, head_dim=16),
}
