"""How much one evaluation computes, counted from its own batches before any of them is answered."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from casp_pl.data.questions import QuestionGroup
from casp_pl.data.tokenize import Processor, tokenizer_of

__all__ = ["EvaluationWork", "count_work"]


@dataclass(frozen=True)
class EvaluationWork:
    """What `answer_questions` and the windows of text put through a model.

    Attributes:
        tokens: of prompts, padded as they are, and of text windows.
        images: that pass through the vision tower.
        passes: forward passes; a model whose blocks stay on disk is read once for each.
        answered: of these, passes that make one more token of every answer of a batch.
        rows: tokens of these, of all batches together.
        scored: positions whose logits are computed.
    """

    tokens: int
    images: int
    passes: int
    answered: int
    rows: int
    scored: int


def count_work(
    batches: Iterable[Sequence[QuestionGroup]],
    processor: Processor,
    *,
    max_new_tokens: int,
    windows: int,
    window: int,
    windows_per_batch: int,
) -> EvaluationWork:
    """Answers are taken to be as long as the expected ones; a batch goes on until its longest has ended.

    Args:
        batches: of questions, as they are answered together.
        processor: the model's; its tokenizer tells how long answers are.
        max_new_tokens: longest answer.
        windows: text windows.
        window: tokens of one.
        windows_per_batch: that pass together.
    """
    text_passes = -(-windows // windows_per_batch)
    tokens, scored, passes = windows * window, windows * (window - 1), text_passes
    images = answered = rows = 0
    for batch in batches:
        suffixes = [suffix for group in batch for suffix in group.suffixes]
        steps = min(_longest_answer(batch, processor), max_new_tokens - 1)  # the prompt gives the first token
        tokens += sum(group.prefix_length for group in batch) + len(suffixes) * max(map(len, suffixes))
        images += len(batch)
        passes += 2 + steps
        answered += steps
        rows += steps * len(suffixes)
        scored += (1 + steps) * len(suffixes)
    return EvaluationWork(tokens, images, passes, answered, rows, scored)


def _longest_answer(batch: Sequence[QuestionGroup], processor: Processor) -> int:
    samples = [sample for group in batch for sample in group.samples]
    expected = {sample.answers[0] if sample.answers else sample.turns[0].answer for sample in samples}
    tokenizer = tokenizer_of(processor)
    return max(len(tokenizer(text, add_special_tokens=False).input_ids) for text in expected)
