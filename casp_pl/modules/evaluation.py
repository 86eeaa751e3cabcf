"""One evaluation of a model as a test run of a Trainer: questions about images, then windows of text."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from casp_pl.data.tokenize import Processor
from casp_pl.errors import InputError
from casp_pl.evaluation.figures import StageFigures
from casp_pl.evaluation.metrics import FlipRate, KLDivergence, Perplexity, VQAAccuracy
from casp_pl.evaluation.paired import PairedAccuracy, PairedFigures
from casp_pl.evaluation.reference import ReferenceOutputs
from casp_pl.evaluation.scoring import AnswerRule, ExactMatch, ScoredAnswer
from casp_pl.evaluation.text import chunked_logits, predicting_hidden
from casp_pl.evaluation.vqa import answer_questions, decode_answers, end_token_ids
from casp_pl.layers import materialized
from casp_pl.linalg import full_width_products
from casp_pl.models.branches import is_counted
from casp_pl.modules.stage_module import StageModule
from casp_pl.processes import of_all

__all__ = ["EvaluationModule"]


class _Answer(NamedTuple):
    """What became of one question: hidden (E,) is the state that the first answer token is read from."""

    sample_id: str
    image: int
    given: str
    accepted: tuple[str, ...]
    category: str
    hidden: Tensor


class EvaluationModule(StageModule):
    """Measures a model with `Trainer.test` on `EvaluationData`; afterwards `figures` and `outputs` hold the results.

        module = EvaluationModule(model, processor, reference=original.outputs)
        trainer.test(module, datamodule=evaluation_data, verbose=False)
        module.figures

    Args:
        model: a LLaVA-type model, or a text model, which gets the text alone.
        processor: its processor or tokenizer.
        rule: scores the answers; `ExactMatch` if not given.
        reference: `outputs` of the original model on the same data; None leaves KL, flips and `comparison` out.
        max_new_tokens: longest answer.
        chunk: text positions whose logits are computed at once.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Processor,
        *,
        rule: AnswerRule | None = None,
        reference: ReferenceOutputs | None = None,
        max_new_tokens: int = 6,
        chunk: int = 512,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.processor = processor
        self.rule = ExactMatch() if rule is None else rule
        self.reference = reference
        self.max_new_tokens = max_new_tokens
        self.chunk = chunk
        # these three see the answers of all processes
        self.accuracy = VQAAccuracy(rule=self.rule, sync_on_compute=False)
        self.flips = FlipRate(sync_on_compute=False)
        self.paired = PairedAccuracy(sync_on_compute=False)
        self.perplexity = Perplexity()
        self.text_kl = KLDivergence()
        self.answer_kl = KLDivergence()
        self.figures: StageFigures | None = None
        self.outputs: ReferenceOutputs | None = None
        self._fast = ExitStack()
        self._answers: dict[int, _Answer] = {}
        self._windows: dict[int, Tensor] = {}
        self._start = 0.0

    def on_test_start(self) -> None:
        """Forget earlier results and dequantize the compressed weights once."""
        self._start = time.perf_counter()
        self.figures, self.outputs = None, None
        self._answers, self._windows = {}, {}
        for metric in (self.accuracy, self.flips, self.paired, self.perplexity, self.text_kl, self.answer_kl):
            metric.reset()
        self._fast.enter_context(materialized(self.model))
        self._fast.enter_context(full_width_products())

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """A batch of questions or of text windows, told apart by what it holds."""
        if not is_counted(batch):
            return
        if "prefix_ids" in batch:
            self._answer(batch)
        else:
            self._read(batch)

    def on_test_epoch_end(self) -> None:
        """Figures out of the metrics; those that apply are logged under `test/`."""
        self._fast.close()
        for answers, windows in of_all((self._answers, self._windows)):
            self._answers |= answers
            self._windows |= windows
        self._compare_answers()
        rows = {number: (a.sample_id, a.given, a.hidden) for number, a in self._answers.items()}
        self.outputs = ReferenceOutputs.collect(rows, self._windows)
        self.figures = self._compute_figures()
        logged = {name: value for name, value in self.figures.to_dict().items() if isinstance(value, float)}
        # they are the same in all processes; their largest is any of them, to the bit
        self.log_dict({f"test/{name}": value for name, value in logged.items()}, sync_dist=True, reduce_fx="max")

    def comparison(self) -> PairedFigures | None:
        """This model and the original question by question; None without a reference or questions."""
        return self.paired.compute() if self._answers and self.reference is not None else None

    def rule_figures(self) -> dict[str, float]:
        """What else the rule reports of this model's answers; empty without questions."""
        answers = [self._answers[number] for number in sorted(self._answers)]
        scores = self._scores([answer.given for answer in answers], answers)
        rows = [
            ScoredAnswer(answer.given, answer.accepted, score, answer.category, answer.image)
            for answer, score in zip(answers, scores, strict=True)
        ]
        return self.rule.figures(rows) if rows else {}

    def _answer(self, batch: dict[str, Any]) -> None:
        answered = answer_questions(self.model, batch, max_new_tokens=self.max_new_tokens)
        predictions = decode_answers(answered.tokens, self.processor, end_token_ids(self.model))
        hidden = answered.hidden.float().cpu()
        numbers, images = batch["numbers"].tolist(), batch["image_numbers"].tolist()
        columns = (batch["sample_ids"], images, predictions, map(tuple, batch["answers"]), batch["categories"], hidden)
        rows = zip(*columns, strict=True)
        self._answers |= {number: _Answer(*row) for number, row in zip(numbers, rows, strict=True)}
        if self.reference is not None:
            self.reference.check_fits(batch["numbers"], batch["sample_ids"])
            theirs = self.reference.answer_hidden[numbers].to(answered.hidden)
            head = self.model.get_output_embeddings()
            self.answer_kl.update(head(theirs), head(answered.hidden), batch["image_numbers"])

    def _compare_answers(self) -> None:
        numbers = sorted(self._answers)
        if not numbers:
            return
        answers = [self._answers[number] for number in numbers]
        given, images = [answer.given for answer in answers], torch.tensor([answer.image for answer in answers])
        self.accuracy.update(given, [answer.accepted for answer in answers], images)
        if self.reference is not None:
            theirs = [self.reference.answers[number] for number in numbers]
            self.flips.update(given, theirs, images)
            self.paired.update(self._scores(theirs, answers), self._scores(given, answers), images)

    def _scores(self, given: Sequence[str], questions: Sequence[_Answer]) -> list[float]:
        return [self.rule.score(text, question.accepted) for text, question in zip(given, questions, strict=True)]

    def _read(self, batch: dict[str, Any]) -> None:
        hidden = predicting_hidden(self.model, batch["input_ids"])
        targets = batch["input_ids"][:, 1:].flatten()
        numbers = batch["numbers"].tolist()
        window_of = batch["numbers"].repeat_interleave(batch["input_ids"].shape[1] - 1)
        stacks = [hidden]
        if self.reference is not None:
            stacks.append(self._reference_windows(numbers, hidden))
        for rows, logits in chunked_logits(self.model.get_output_embeddings(), *stacks, chunk=self.chunk):
            self.perplexity.update(logits[0], targets[rows], window_of[rows])
            if self.reference is not None:
                self.text_kl.update(logits[1], logits[0], window_of[rows])
        self._windows.update(zip(numbers, hidden.float().cpu(), strict=True))

    def _reference_windows(self, numbers: list[int], hidden: Tensor) -> Tensor:
        stored = self.reference.text_hidden if self.reference is not None else hidden
        if max(numbers) >= len(stored) or stored.shape[1:] != hidden.shape[1:]:
            raise InputError(
                f"The original model's outputs hold {tuple(stored.shape)} text positions, these windows are "
                f"{tuple(hidden.shape)}: evaluate the original again with the same evaluation settings"
            )
        return stored[numbers].to(hidden)

    def _compute_figures(self) -> StageFigures:
        asked, read, compared = bool(self._answers), bool(self._windows), self.reference is not None
        vqa: dict[str, Any] = self.accuracy.compute() if asked else {}
        text: dict[str, Any] = self.perplexity.compute() if read else {}
        text_kl: dict[str, Any] = self.text_kl.compute() if compared and read else {}
        answer_kl: dict[str, Any] = self.answer_kl.compute() if compared and asked else {}
        flips: dict[str, Any] = self.flips.compute() if compared and asked else {}
        return StageFigures(
            vqa_accuracy=vqa.get("accuracy"),
            vqa_interval=vqa.get("interval"),
            vqa_accuracy_not_yes_no=vqa.get("accuracy_not_yes_no"),
            perplexity=text.get("perplexity"),
            perplexity_interval=text.get("interval"),
            kl=text_kl.get("kl"),
            kl_interval=text_kl.get("interval"),
            kl_answers=answer_kl.get("kl"),
            kl_answers_interval=answer_kl.get("interval"),
            flip_rate=flips.get("flip_rate"),
            flip_interval=flips.get("interval"),
            questions=len(self._answers),
            text_tokens=sum(map(len, self._windows.values())),
            seconds=time.perf_counter() - self._start,
        )
