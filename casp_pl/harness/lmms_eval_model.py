"""lmms-eval's model `casp`: what `fit` saved, with images and without."""

from typing import Any

import torch
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from casp_pl.checkpoint import load_compressed
from casp_pl.data.chat import chat_inputs, message
from casp_pl.data.tokenize import tokenizer_of
from casp_pl.errors import ConfigError

__all__ = ["CaspMultimodalModel"]

_LONGEST_ANSWER = 128


class CaspMultimodalModel(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """Answers by greedy decoding, one question at a time, images in front of the text as in training.

    Args:
        pretrained: directory of the model.
        device: where it goes; a GPU if there is one.
        batch_size: lmms-eval gives it; only 1 is possible.
        max_batch_size: lmms-eval gives it; it has no meaning here.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if int(batch_size) != 1:
            raise ConfigError(f"lmms_eval: --batch_size is {batch_size}, only 1 is possible")
        self.place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model, self.processor = load_compressed(pretrained, device=self.place)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers, in the order of the requests."""
        answers = []
        for request in tqdm(requests, desc="casp", disable=self.rank != 0):
            text, settings, to_images, number, task, split = request.args
            images = to_images(self.task_dict[task][split][number]) or []
            answers.append(self._answer(text, images, settings))
            self.cache_hook.add_partial("generate_until", (text, settings), answers[-1])
        return answers

    @torch.no_grad()
    def _answer(self, text: str, images: list[Image.Image], settings: dict[str, Any]) -> str:
        if settings.get("temperature"):
            raise ConfigError("lmms_eval: the task samples its answers (temperature above 0); here decoding is greedy")
        asked = message(self.processor, "user", text.replace("<image>", "").strip(), images=len(images))
        inputs = chat_inputs(self.processor, [asked], [image.convert("RGB") for image in images]).to(self.place)
        longest = settings.get("max_new_tokens") or _LONGEST_ANSWER
        tokens = self.model.generate(**inputs, max_new_tokens=longest, do_sample=False, pad_token_id=0)
        fresh = tokens[0, inputs["input_ids"].shape[1] :]
        answer = str(tokenizer_of(self.processor).decode(fresh, skip_special_tokens=True))
        until = settings.get("until") or []
        for end in [until] if isinstance(until, str) else until:
            answer = answer.split(end)[0] if end else answer
        return answer.strip()

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not here: lm_eval does it for text.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("lmms_eval: this task needs likelihoods; tasks with generated answers are possible here")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not here.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("lmms_eval: tasks of several rounds are not possible here")
