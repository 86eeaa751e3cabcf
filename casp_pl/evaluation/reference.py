"""What the original model said, kept so that every compressed stage can be compared with it.

Exact KL needs the original's logits, 49,152 numbers per position and more. Kept instead are its hidden states after the
final norm: the logits are recomputed with the lm_head. That is exact because lm_head (and the embeddings tied to it) is
never compressed and never trained, so original and compressed model share it.

Shapes: Q questions, M predicted text positions (window by window), E hidden size.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from casp_pl.errors import InputError

__all__ = ["ReferenceOutputs"]


@dataclass(frozen=True)
class ReferenceOutputs:
    """Outputs of a model on the evaluation data.

    Attributes:
        sample_ids: ids of the Q questions.
        answers: the Q generated answers.
        answer_hidden: (Q, E) hidden state after the final norm that the first answer token is read from.
        text_hidden: (windows, T - 1, E) the same at every text position that predicts another one.
    """

    sample_ids: tuple[str, ...]
    answers: tuple[str, ...]
    answer_hidden: Tensor
    text_hidden: Tensor

    def check_fits(self, numbers: Tensor, sample_ids: Sequence[str]) -> None:
        """The questions of a batch must be the ones that these outputs are of.

        Raises:
            InputError: the outputs belong to other evaluation data.
        """
        rows = numbers.tolist()
        if max(rows) >= len(self.sample_ids) or [self.sample_ids[row] for row in rows] != list(sample_ids):
            raise InputError(
                "The original model's outputs are of other questions than these: evaluate the original again "
                "with the same evaluation settings"
            )

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """(tensors, metadata) as safetensors files hold them."""
        tensors = {"answer_hidden": self.answer_hidden, "text_hidden": self.text_hidden}
        metadata = {"sample_ids": json.dumps(self.sample_ids), "answers": json.dumps(self.answers)}
        return {name: value.contiguous() for name, value in tensors.items()}, metadata

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> "ReferenceOutputs":
        """The inverse of `to_tensors`."""
        return cls(
            sample_ids=tuple(json.loads(metadata["sample_ids"])),
            answers=tuple(json.loads(metadata["answers"])),
            answer_hidden=tensors["answer_hidden"],
            text_hidden=tensors["text_hidden"],
        )

    @classmethod
    def collect(cls, answers: dict[int, tuple[str, str, Tensor]], windows: dict[int, Tensor]) -> "ReferenceOutputs":
        """From rows by number: (sample id, answer, hidden (E,)) per question and hidden (T - 1, E) per window."""
        rows = [answers[number] for number in sorted(answers)]
        texts = [windows[number] for number in sorted(windows)]
        return cls(
            tuple(row[0] for row in rows),
            tuple(row[1] for row in rows),
            torch.stack([row[2] for row in rows]) if rows else torch.empty(0, 0),
            torch.stack(texts) if texts else torch.empty(0, 0, 0),
        )
