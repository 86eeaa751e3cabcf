"""Questions for evaluation, grouped by image, so that the prompt up to the image is computed once per image.

Shapes: B images, P tokens of a prefix (everything up to and with the image), R questions of all B images, S tokens of
the longest suffix (the rest of the prompt).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

import torch

from casp_pl.data.collate import load_pixels, pad_right
from casp_pl.data.images import ImageRefusedError
from casp_pl.data.sample import Sample
from casp_pl.data.selection import group_by_image, shuffled
from casp_pl.data.skipped import Skipped
from casp_pl.data.tokenize import Encoded, Processor, encode_prompt, image_tokens_of, pad_token_id, picture_token_id
from casp_pl.errors import InputError

__all__ = ["QuestionCollator", "QuestionGroup", "batch_groups", "choose_questions", "encode_questions"]


@dataclass(frozen=True)
class QuestionGroup:
    """The questions about one image that share a prefix.

    Attributes:
        prefix: the prompt of the first question; only its first `prefix_length` tokens are the prefix.
        prefix_length: P.
        samples: the questions.
        suffixes: for each question, the tokens of its prompt after the prefix.
        image_number: number of the image in the evaluation.
        first_number: number of the first question in the evaluation; the others follow.
    """

    prefix: Encoded
    prefix_length: int
    samples: tuple[Sample, ...]
    suffixes: tuple[tuple[int, ...], ...]
    image_number: int = 0
    first_number: int = 0


def choose_questions(samples: Sequence[Sample], count: int | None, seed: int) -> list[Sample]:
    """Whole images in seeded random order until there are `count` questions, then cut; None takes all as they are."""
    if count is None or count >= len(samples):
        return list(samples)
    groups = shuffled(group_by_image(samples), torch.Generator().manual_seed(seed))
    return [sample for group in groups for sample in group][:count]


def encode_questions(samples: Sequence[Sample], processor: Processor) -> tuple[list[QuestionGroup], list[Skipped]]:
    """The first question of every sample, grouped by image, prefixes of one length next to each other.

    Raises:
        InputError: a sample has no image or no question.
    """
    groups: list[QuestionGroup] = []
    skipped: list[Skipped] = []
    for image_number, group in enumerate(group_by_image(samples)):
        if not group[0].images or not group[0].turns:
            raise InputError(f"Sample {group[0].id}: an evaluation question needs an image, a question and an answer")
        try:
            image_tokens = image_tokens_of(group[0], processor)
        except ImageRefusedError as error:
            skipped += [Skipped(sample.id, str(error)) for sample in group]
            continue
        prompts: dict[tuple[int, ...], list[tuple[Sample, Encoded]]] = {}
        for sample in group:
            prompt = encode_prompt(sample, processor, image_tokens=image_tokens)
            prompts.setdefault(_prefix(prompt, processor), []).append((sample, prompt))
        groups += [_question_group(len(prefix), members, image_number) for prefix, members in prompts.items()]
    return _numbered(sorted(groups, key=lambda group: group.prefix_length)), skipped


def batch_groups(groups: Sequence[QuestionGroup], images_per_batch: int) -> list[list[QuestionGroup]]:
    """Batches of at most `images_per_batch` groups whose prefixes have one length."""
    batches = []
    for _, same_length in groupby(groups, key=lambda group: group.prefix_length):
        run = list(same_length)
        batches += [run[start : start + images_per_batch] for start in range(0, len(run), images_per_batch)]
    return batches


class QuestionCollator:
    """Makes one batch of question groups.

    prefix_ids (B, P), image_inputs (dict of what the image processor makes, pixel_values (B, 3, H, W) above all),
    suffix_ids and suffix_mask (R, S), right-padded, image_of_row (R,) the row's image within the batch, image_numbers
    and numbers (R,) image and question within the evaluation; lists of R: sample_ids, answers (for each question all
    that count) and categories.
    """

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.pad_id = pad_token_id(processor)

    def __call__(self, groups: Sequence[QuestionGroup]) -> dict[str, Any]:
        """The batch; images are decoded now."""
        sizes = torch.tensor([len(group.samples) for group in groups])
        suffixes = [suffix for group in groups for suffix in group.suffixes]
        samples = [sample for group in groups for sample in group.samples]
        numbers = [group.first_number + row for group in groups for row in range(len(group.samples))]
        return {
            "prefix_ids": torch.tensor([group.prefix.input_ids[: group.prefix_length] for group in groups]),
            "image_inputs": load_pixels([group.prefix for group in groups], self.processor),
            "suffix_ids": pad_right(suffixes, self.pad_id),
            "suffix_mask": pad_right([(1,) * len(suffix) for suffix in suffixes], 0),
            "image_of_row": torch.arange(len(groups)).repeat_interleave(sizes),
            "image_numbers": torch.tensor([group.image_number for group in groups]).repeat_interleave(sizes),
            "numbers": torch.tensor(numbers),
            "sample_ids": [sample.id for sample in samples],
            "answers": [sample.answers or (sample.turns[0].answer,) for sample in samples],
            "categories": [sample.category for sample in samples],
        }


def _prefix(prompt: Encoded, processor: Processor) -> tuple[int, ...]:
    end = len(prompt) - prompt.input_ids[::-1].index(picture_token_id(processor, prompt))
    return prompt.input_ids[:end]


def _question_group(length: int, members: Sequence[tuple[Sample, Encoded]], image_number: int) -> QuestionGroup:
    samples, prompts = zip(*members, strict=True)
    suffixes = tuple(prompt.input_ids[length:] for prompt in prompts)
    return QuestionGroup(prompts[0], length, samples, suffixes, image_number)


def _numbered(groups: Sequence[QuestionGroup]) -> list[QuestionGroup]:
    firsts = accumulate((len(group.samples) for group in groups), initial=0)
    return [replace(group, first_number=first) for group, first in zip(groups, firsts, strict=False)]
