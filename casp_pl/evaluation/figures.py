"""The figures of one stage, as they stand in report.json."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["StageFigures"]


@dataclass(frozen=True)
class StageFigures:
    """What a model was measured at; None for what does not apply.

    Attributes:
        vqa_accuracy: share of the questions answered right, by generated text.
        vqa_interval: its 95 % interval (low, high), by a bootstrap over images.
        vqa_accuracy_not_yes_no: the same share among the questions whose answer is not yes or no.
        perplexity: of the held-out text.
        perplexity_interval: its 95 % interval, by a bootstrap over windows of text.
        kl: mean KL divergence of the next-token distributions on the text to the original's, in nats per token.
        kl_interval: its 95 % interval, over windows of text.
        kl_answers: the same at the first token of the answers, in nats per question.
        kl_answers_interval: its 95 % interval, over images.
        flip_rate: share of the questions whose answer differs from the original's.
        flip_interval: its 95 % interval, over images.
        questions: number of questions.
        text_tokens: number of text tokens that were predicted.
        seconds: wall time of the evaluation.
    """

    vqa_accuracy: float | None
    vqa_interval: tuple[float, float] | None
    vqa_accuracy_not_yes_no: float | None
    perplexity: float | None
    perplexity_interval: tuple[float, float] | None
    kl: float | None
    kl_interval: tuple[float, float] | None
    kl_answers: float | None
    kl_answers_interval: tuple[float, float] | None
    flip_rate: float | None
    flip_interval: tuple[float, float] | None
    questions: int
    text_tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """All figures by name, ready for JSON."""
        return asdict(self)
