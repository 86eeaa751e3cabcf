"""The tiny model is always the same, and small but whole: grouped queries, images, generation."""

import torch
from PIL import Image

from casp_pl.models.tiny import load_tiny


def test_same_weights_at_every_call_and_no_trace_in_the_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = load_tiny()[0].state_dict()
    assert torch.equal(torch.rand(4), expected), "the caller's random numbers must not change"
    second, other = load_tiny()[0].state_dict(), load_tiny(seed=1)[0].state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_weights_are_numbers_of_float16() -> None:
    for parameter in load_tiny()[0].parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, parameter.half().float())


def test_grouped_query_attention_shapes() -> None:
    model, _ = load_tiny()
    blocks = model.model.language_model.layers
    assert len(blocks) == 2
    for block in blocks:
        attention = block.self_attn
        shapes = [tuple(getattr(attention, f"{name}_proj").weight.shape) for name in "qkvo"]
        assert shapes == [(64, 48), (32, 48), (32, 48), (48, 64)]
        assert attention.num_key_value_groups == 2


def test_text_survives_the_tokenizer() -> None:
    _, processor = load_tiny()
    text = "Is there a red circle? 5 > 3, caf\u00e9"
    tokens = processor.tokenizer(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    assert processor.tokenizer.decode(tokens) == text


def test_generates_and_sees_the_image() -> None:
    model, processor = load_tiny()
    content = [{"type": "image"}, {"type": "text", "text": "what colour is it?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    logits = []
    for colour in ("red", "blue"):
        inputs = processor(images=[Image.new("RGB", (40, 40), colour)], text=[prompt], return_tensors="pt")
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16
        with torch.no_grad():
            logits.append(model(**inputs).logits[0, -1])
    assert not torch.allclose(*logits, atol=1e-3)
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert inputs["input_ids"].shape[1] < tokens.shape[1] <= inputs["input_ids"].shape[1] + 5
    assert tokens[0, inputs["input_ids"].shape[1]] == logits[1].argmax()
