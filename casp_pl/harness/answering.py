"""Generated answers and likelihoods of several questions at once.

Shapes: B questions, T tokens of the longest, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from casp_pl.data.collate import Collator
from casp_pl.data.sample import Sample
from casp_pl.data.tokenize import (
    IGNORE,
    Processor,
    encode_prompt,
    encode_sample,
    image_tokens_of,
    pad_token_id,
    tokenizer_of,
)
from casp_pl.models.streams import model_inputs

__all__ = ["generate_answers", "generation_settings", "log_likelihoods"]

_LONGEST_ANSWER = 128
_SAMPLING = ("temperature", "top_p", "top_k")


def generation_settings(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a task's `generation_kwargs` mean to transformers' `generate`.

    As in the harness's own models a temperature above 0 samples where `do_sample` is not given; one of 0 never does.
    """
    temperature = asked.get("temperature")
    sampled = bool(asked.get("do_sample", temperature)) and temperature != 0
    chosen = {name: asked[name] for name in _SAMPLING if sampled and asked.get(name) is not None}
    longest = asked.get("max_new_tokens") or _LONGEST_ANSWER
    return {"max_new_tokens": longest, "do_sample": sampled, "num_beams": asked.get("num_beams") or 1, **chosen}


@torch.no_grad()
def generate_answers(
    model: Any, processor: Processor, samples: Sequence[Sample], asked: Mapping[str, Any]
) -> list[str]:
    """The B answers to the samples' first questions, each cut in front of the first of `asked["until"]`.

    Args:
        model: on its device.
        processor: of the model.
        samples: B questions.
        asked: the task's `generation_kwargs`, the same for all.
    """
    encoded = [encode_prompt(sample, processor, image_tokens=image_tokens_of(sample, processor)) for sample in samples]
    inputs = _on_device(model, _padded_left(model_inputs(Collator(processor)(encoded))))
    tokens = model.generate(**inputs, pad_token_id=pad_token_id(processor), **generation_settings(asked))
    fresh = tokens[:, inputs["input_ids"].shape[1] :]
    answers = tokenizer_of(processor).batch_decode(fresh, skip_special_tokens=True)
    until = asked.get("until") or []
    return [_cut(answer, [until] if isinstance(until, str) else until).strip() for answer in answers]


@torch.no_grad()
def log_likelihoods(model: Any, processor: Processor, samples: Sequence[Sample]) -> list[tuple[float, bool]]:
    """For each of the B samples log p(answer and its end | question) in nats, and whether it is the greedy answer."""
    encoded = [encode_sample(sample, processor, image_tokens=image_tokens_of(sample, processor)) for sample in samples]
    batch = Collator(processor)(encoded)
    logits = model(**_on_device(model, model_inputs(batch)), use_cache=False).logits
    results = []
    for row, labels in zip(logits, batch["labels"], strict=True):
        places = (labels != IGNORE).nonzero()[:, 0]
        expected = labels[places].to(row.device)
        scores = row[places - 1].float().log_softmax(-1)  # (answer tokens, V)
        picked = scores.gather(1, expected[:, None])
        results.append((float(picked.double().sum()), bool((scores.argmax(-1) == expected).all())))
    return results


def _padded_left(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Right-padded (B, T) with the padding in front, so that every answer follows its question."""
    lengths = inputs["attention_mask"].sum(1)
    shifts = (inputs["attention_mask"].shape[1] - lengths).tolist()

    def shifted(rows: Tensor) -> Tensor:
        return torch.stack([row.roll(shift) for row, shift in zip(rows, shifts, strict=True)])

    return inputs | {name: shifted(inputs[name]) for name in ("input_ids", "attention_mask")}


def _on_device(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _cut(answer: str, ends: Sequence[str]) -> str:
    for end in ends:
        answer = answer.split(end)[0] if end else answer
    return answer
