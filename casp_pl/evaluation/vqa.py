"""Questions about images, answered by greedy generation; the image part of the prompt is computed once per image.

The prefix (everything up to and with the image) of B images goes through the model once. Its key-value cache is then
copied to the R questions, whose remaining tokens go through right-padded, then one token per step until every answer
has ended. The answers are those of `model.generate` on one question at a time.

Shapes: B images, P prefix tokens, R questions, S tokens of the longest suffix, E hidden size, A tokens of the longest
answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from casp_pl.data.evaluation import question_loader
from casp_pl.data.questions import encode_questions
from casp_pl.data.sample import Sample
from casp_pl.data.skipped import refuse_too_many_skipped
from casp_pl.data.tokenize import Processor, tokenizer_of
from casp_pl.errors import InputError
from casp_pl.models.layout import block_windows

__all__ = ["GeneratedAnswers", "VQAOutputs", "answer_questions", "decode_answers", "end_token_ids", "evaluate_vqa"]


@dataclass(frozen=True)
class GeneratedAnswers:
    """Answers of one batch.

    Attributes:
        tokens: (R, A) generated token ids, the end token included, and repeated after it.
        hidden: (R, E) hidden state after the final norm that the first answer token is read from.
    """

    tokens: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class VQAOutputs:
    """Answers to all questions, images that cannot be read left out.

    Attributes:
        sample_ids: ids of the questions.
        predictions: the generated answers.
        answers: the expected answers.
        image_numbers: (R,) which questions share an image.
        hidden: (R, E) as in `GeneratedAnswers`.
    """

    sample_ids: list[str]
    predictions: list[str]
    answers: list[str]
    image_numbers: Tensor
    hidden: Tensor


def evaluate_vqa(
    model: nn.Module,
    processor: Processor,
    samples: Sequence[Sample],
    *,
    images_per_batch: int = 8,
    max_new_tokens: int = 6,
) -> VQAOutputs:
    """Answer the first question of every sample, on the model's device.

    Args:
        model: a LLaVA-type model; wrap the call in `materialized(model)` when it is compressed.
        processor: its processor.
        samples: questions with images; those of one image are answered together.
        images_per_batch: images whose questions are answered together.
        max_new_tokens: longest answer.

    Raises:
        InputError: a sample without image or question, or more than 5 % unreadable images.
    """
    groups, skipped = encode_questions(samples, processor)
    refuse_too_many_skipped(skipped, len(samples))
    device = next(model.parameters()).device
    batches, predictions, hidden = [], [], []
    for batch in question_loader(groups, processor, images_per_batch):
        answered = answer_questions(model, _to(batch, device), max_new_tokens=max_new_tokens)
        batches.append(batch)
        predictions += decode_answers(answered.tokens, processor, end_token_ids(model))
        hidden.append(answered.hidden.cpu())
    return VQAOutputs(
        [sample_id for batch in batches for sample_id in batch["sample_ids"]],
        predictions,
        [answers[0] for batch in batches for answers in batch["answers"]],
        torch.cat([batch["image_numbers"] for batch in batches]),
        torch.cat(hidden),
    )


@torch.no_grad()
def answer_questions(model: Any, batch: Mapping[str, Any], *, max_new_tokens: int = 6) -> GeneratedAnswers:
    """Greedy answers to a batch of `QuestionCollator`, at most `max_new_tokens` tokens each."""
    backbone, head = model.model, model.get_output_embeddings()
    ends = torch.tensor(end_token_ids(model), device=batch["prefix_ids"].device)
    mask = batch["suffix_mask"]
    lengths = mask.sum(1)
    prefix_length = batch["prefix_ids"].shape[1]
    _refuse_short_windows(model, prefix_length + mask.shape[1] + max_new_tokens)
    mask = torch.cat([mask.new_ones(len(mask), prefix_length), mask], dim=1)
    cache = _prefix_cache(backbone, batch)
    output = backbone(
        input_ids=batch["suffix_ids"],
        attention_mask=mask,
        position_ids=prefix_length + torch.arange(batch["suffix_ids"].shape[1], device=mask.device)[None],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    first = output[torch.arange(len(lengths), device=lengths.device), lengths - 1]
    tokens = [head(first).argmax(-1)]
    finished = torch.isin(tokens[0], ends)
    for step in range(max_new_tokens - 1):
        if finished.all():
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        output = backbone(
            input_ids=tokens[-1][:, None],
            attention_mask=mask,
            position_ids=(prefix_length + lengths + step)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        tokens.append(torch.where(finished, tokens[-1], head(output[:, -1]).argmax(-1)))
        finished |= torch.isin(tokens[-1], ends)
    return GeneratedAnswers(torch.stack(tokens, dim=1), first)


def decode_answers(tokens: Tensor, processor: Processor, ends: Sequence[int]) -> list[str]:
    """The text of each row of (R, A) token ids up to its end token."""
    tokenizer = tokenizer_of(processor)
    texts = []
    for row in tokens.tolist():
        end = next((number for number, token in enumerate(row) if token in ends), len(row))
        texts.append(tokenizer.decode(row[:end], skip_special_tokens=True).strip())
    return texts


def end_token_ids(model: Any) -> list[int]:
    """The tokens that end an answer, as `model.generate` takes them."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return []
    return list(ends) if isinstance(ends, list | tuple) else [ends]


def _prefix_cache(backbone: Any, batch: Mapping[str, Any]) -> Any:
    """Keys and values of the B prefixes, copied to the R questions."""
    ids = batch["prefix_ids"]
    output = backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **batch["image_inputs"])
    cache = output.past_key_values
    cache.batch_select_indices(batch["image_of_row"])
    return cache


def _refuse_short_windows(model: Any, tokens: int) -> None:
    """Padding between a question and its answer would count as tokens that a sliding window holds.

    Raises:
        InputError: prompt and answer are longer than a window of the model.
    """
    windows = [window for window in block_windows(model.config.get_text_config()) if window is not None]
    if windows and tokens > min(windows):
        raise InputError(
            f"Questions and images take up to {tokens} tokens, the model's sliding window holds {min(windows)}.\n"
            "Such models are evaluated on text alone: set evaluation.questions to 0."
        )


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return {name: _to(part, device) for name, part in value.items()} if isinstance(value, dict) else value
