"""A random LLaVA of 68 thousand weights with a byte tokenizer: the whole pipeline in seconds, nothing to download."""

from typing import TYPE_CHECKING, Any

import torch

from casp_pl.models.demo.llava import CHAT_TEMPLATE

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

__all__ = ["byte_tokenizer", "load_tiny", "make_processor"]

_IMAGE_SIZE, _PATCH_SIZE = 32, 8
_SPECIAL = ("<|im_start|>", "<|im_end|>", "<image>")


def load_tiny(seed: int = 0, *, blocks: int = 2) -> tuple["LlavaForConditionalGeneration", "LlavaProcessor"]:
    """Two blocks of hidden size 48, 4 query heads on 2 key heads, 16 image tokens. The same weights at every call."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    processor = make_processor(image_size=_IMAGE_SIZE, patch_size=_PATCH_SIZE)
    tokenizer = processor.tokenizer
    vocabulary = tokenizer.get_vocab()
    start, end, image = (vocabulary[token] for token in _SPECIAL)
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
        bos_token_id=start, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=_IMAGE_SIZE,
        patch_size=_PATCH_SIZE, projection_dim=16,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image, vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=16, tie_word_embeddings=True, dtype="float32",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlavaForConditionalGeneration(config)
        for parameter in model.parameters():
            # 0.02 would leave the blocks without any influence at this width
            parameter.data.mul_(5.0 if parameter.dim() > 1 else 1.0)
            parameter.data.copy_(parameter.data.half())
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = end
    return model.eval(), processor


def byte_tokenizer(special: tuple[str, ...], chat_template: str | None = None) -> "PreTrainedTokenizerFast":
    """One token a byte, and the special ones: the start and the end of a turn, then others."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    start, end, *others = special
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=end
    )
    fast.add_special_tokens({"additional_special_tokens": others})
    if chat_template is not None:
        fast.chat_template = chat_template
    return fast


def make_processor(*, image_size: int, patch_size: int) -> "LlavaProcessor":
    """A byte tokenizer and an image processor for square images of so many pixels."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    size = {"height": image_size, "width": image_size}
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        tokenizer=byte_tokenizer(_SPECIAL),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    )
