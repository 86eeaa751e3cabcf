"""lmms-eval's model `casp`: what `fit` saved, with images, videos and text alone."""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from tqdm import tqdm

from casp_pl.checkpoint import load_compressed
from casp_pl.data.sample import Sample
from casp_pl.errors import ConfigError
from casp_pl.harness.answering import generate_answers, log_likelihoods
from casp_pl.harness.command import said_by_us
from casp_pl.harness.questions import question_sample

__all__ = ["CaspMultimodalModel"]


class CaspMultimodalModel(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """Answers questions as the task wants them (greedy, sampled, beams), and scores given answers.

    Args:
        pretrained: directory of the model.
        device: where it goes; a GPU if there is one.
        batch_size: questions that are answered together.
        max_batch_size: lmms-eval gives it; it has no meaning here.
    """

    @said_by_us()
    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"lmms_eval: --batch_size is {batch_size}, it must be a number, 1 or more")
        self.batch_size = int(batch_size)
        self.model, self.processor = load_compressed(
            pretrained, device=device or ("cuda" if torch.cuda.is_available() else "cpu")
        )

    @said_by_us()
    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers, in the order of the requests."""
        answers = []
        for batch in self._batches(requests, lambda request: request.args[1]):
            settings = batch[0].args[1]
            samples = [self._sample(text, "", *where) for text, _, *where in (request.args for request in batch)]
            answers += generate_answers(self.model, self.processor, samples, settings)
            for request, answer in zip(batch, answers[-len(batch) :], strict=True):
                self.cache_hook.add_partial("generate_until", (request.args[0], settings), answer)
        return answers

    @said_by_us()
    def loglikelihood(self, requests: list[Any]) -> list[GenerationResult]:
        """For each given answer and its end: a score, and whether the model itself would say it.

        The score is the negative log-probability for multiple choice, where lmms-eval takes the smallest, and the
        log-probability for tasks of the type loglikelihood.

        Raises:
            ConfigError: a likelihood without a question, as the metric acc_mutual_info wants it.
        """
        results = []
        for batch in self._batches(requests, lambda request: len(request.args)):
            if len(batch[0].args) == 2:
                raise ConfigError("lmms_eval: acc_mutual_info is not possible here: leave it out of metric_list")
            chosen = [isinstance(request.args[1], str) for request in batch]
            samples = [self._sample(text, answer, *where) for text, answer, *where in (r.args for r in batch)]
            found = log_likelihoods(self.model, self.processor, samples)
            signs = [-1 if choice else 1 for choice in chosen]
            scores = [(sign * score, greedy) for sign, (score, greedy) in zip(signs, found, strict=True)]
            results += [GenerationResult(text=pair) for pair in scores]  # lmms-eval 0.7.3 makes a string of a bare pair
        return results

    @said_by_us()
    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not here.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("lmms_eval: tasks of several rounds are not possible here")

    def _batches(self, requests: list[Any], alike: Callable[[Any], Any]) -> Iterator[list[Any]]:
        """Neighbours that are alike, at most `batch_size` at once."""
        with tqdm(total=len(requests), desc="casp", disable=self.rank != 0) as bar:
            for _, group in groupby(requests, alike):
                members = list(group)
                for start in range(0, len(members), self.batch_size):
                    batch = members[start : start + self.batch_size]
                    yield batch
                    bar.update(len(batch))

    def _sample(self, text: str, answer: Any, to_visuals: Any, number: int, task: str, split: str) -> Sample:
        row = self.task_dict[task][split][number]
        given = answer(row) if callable(answer) else answer
        visuals = to_visuals(row) or []
        return question_sample(f"{task}/{number}", text, visuals, self.processor, str(given).strip())
