"""End-to-end fine-tuning of the whole compressed model against the original's logits (method E)."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from casp_pl.data.tokenize import IGNORE
from casp_pl.kernels import head_divergence
from casp_pl.models.activations import Keep, in_memory
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.branches import is_counted
from casp_pl.models.soundness import require_materialized
from casp_pl.models.streams import first_block_batches, model_inputs, run_blocks
from casp_pl.modules.checkpointing import checkpointed
from casp_pl.modules.compiling import CompiledBlocks
from casp_pl.modules.parameters import relative_groups, trainable_parameters, warmed_cosine
from casp_pl.modules.sharding import Sharding, build_sharded, clip_gradients, plain_name, unwrapped
from casp_pl.modules.stage_module import StageModule
from casp_pl.processes import mean_of_all, process_count, sum_of_all

__all__ = [
    "EndToEndModule",
    "answer_mask",
    "divergences",
    "final_states",
    "original_states",
    "target_mask",
    "teacher_states",
]


@torch.no_grad()
def teacher_states(
    adapter: ModelAdapter,
    batches: Iterable[dict[str, Any]],
    keep: Keep = in_memory,
    *,
    needed: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """The original's final hidden states at the tokens that are trained on.

    The output head is never compressed, so these few numbers give the original's logits exactly, at 1/85 of their size.
    A sample is taken from the first batch that it is in: last bits depend on what it is padded to, and a stage that was
    stopped shall get the same.

    Args:
        adapter: the original model.
        batches: all of the stage from its first step on.
        keep: keeps the states, and what the batches are between blocks.
        needed: ids of the samples that are still to come; None for all.

    Returns:
        Sample id -> (tokens, I), of each that is in a batch with one that is needed.
    """
    wanted, seen = [], set[str]()
    for batch in batches:
        if is_counted(batch):
            new = set(batch["sample_ids"]) - seen
            seen |= new
            if new if needed is None else not new.isdisjoint(needed):
                wanted.append(batch)
    teacher: dict[str, Tensor] = {}
    for batch, hidden in zip(wanted, original_states(adapter, wanted, keep), strict=True):
        targets = target_mask(batch).to(hidden.device)
        kept = keep(hidden[targets].cpu())  # of the batch, because a file of its own for every sample is too many
        for name, states in zip(batch["sample_ids"], torch.split(kept, targets.sum(1).tolist()), strict=True):
            teacher.setdefault(name, states)
    return teacher


@torch.no_grad()
def original_states(
    adapter: ModelAdapter, batches: Sequence[Mapping[str, Any]], keep: Keep = in_memory
) -> Iterator[Tensor]:
    """`final_states` of the original for every batch; all batches go through a block before the next is read."""
    states = first_block_batches(adapter, batches, keep=keep)
    for block in adapter.originals():
        states = run_blocks(block, states, keep)
    for state in states:
        hidden: Tensor = adapter.decoder.norm(state.hidden.to(adapter.device))
        yield hidden


def final_states(adapter: ModelAdapter, batch: Mapping[str, Any]) -> Tensor:
    """Hidden states after the final norm, (B, T, I)."""
    inner = getattr(adapter.model, "model", adapter.model)
    inputs = model_inputs(batch, adapter.model.dtype, adapter.shortest_window)
    states: Tensor = inner(**inputs, use_cache=False).last_hidden_state
    return states


def target_mask(batch: Mapping[str, Any]) -> Tensor:
    """True where the next token is labelled, of an answer or of a plain text: (B, T) bool."""
    labelled: Tensor = batch["labels"][:, 1:] != IGNORE
    mask: Tensor = F.pad(labelled, (0, 1))
    return mask if is_counted(batch) else torch.zeros_like(mask)


def answer_mask(batch: Mapping[str, Any]) -> Tensor:
    """True where the next token belongs to the answer of a conversation: (B, T) bool; a plain text has no answer."""
    unlabelled: Tensor = batch["attention_mask"].bool() & (batch["labels"] == IGNORE)
    return target_mask(batch) & unlabelled[:, 1:].any(dim=1, keepdim=True)


def divergences(adapter: ModelAdapter, batch: Mapping[str, Any], teacher: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """Mean KL to the original and number of tokens, of plain texts and of answers.

    Args:
        adapter: the model with its compressed blocks in place.
        batch: (B, T).
        teacher: the original's final hidden states at the tokens that are trained on, a tensor (tokens, I) a sample.
    """
    targets = target_mask(batch)
    student = final_states(adapter, batch)[targets]
    original = torch.cat([student.new_empty(0, student.shape[1]), *(states.to(student) for states in teacher)])
    answers = answer_mask(batch)[targets]
    return [_divergence(adapter, student[chosen], original[chosen]) for chosen in (~answers, answers)]


def _divergence(adapter: ModelAdapter, student: Tensor, teacher: Tensor) -> tuple[Tensor, int]:
    mean = head_divergence(student, teacher, adapter.head.weight) if len(student) else student.sum()
    return mean, len(student)


class EndToEndModule(StageModule):
    """Trains codebooks, scales and norms of all blocks; loss = KL to the original's logits where labels are.

    It is the mean over the tokens of plain texts plus `answer_weight` times the mean over the answers of conversations.
    Answers are short. In one mean with the text they got lost: VQA accuracy fell from 86.2 % to 64.6 % while
    perplexity improved from 32.2 to 28.3.

    Args:
        adapter: the model with its compressed blocks in place.
        teacher: the original's final hidden states by sample id, see `teacher_states`.
        lr: step of Adam relative to the size of each tensor.
        steps: optimizer steps.
        warmup: share of the steps over which the learning rate rises.
        answer_weight: what the mean over the answers counts beside the mean over plain texts.
        activation_checkpointing: whether to keep only the inputs of blocks for the backward pass, which computes the
            rest again: far less memory for a third more time.
        compile_backend: of torch.compile, such as `inductor`, which needs a C++ compiler; null runs blocks as they are.
        update_codes: whether `CodebookUpdate` takes part in this stage as it does in block tuning. It holds two dense
            weights of every layer; on the embedded model not one of its updates lowered the loss here.
        sharding: where it is given, `adapter` is the original; a compressed copy is built and divided among the
            processes.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        teacher: Mapping[str, Tensor],
        *,
        lr: float = 3e-4,
        steps: int = 40,
        warmup: float = 0.3,
        answer_weight: float = 1.0,
        activation_checkpointing: bool = False,
        compile_backend: str | None = None,
        update_codes: bool = False,
        sharding: Sharding | None = None,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.sharding = sharding
        self.student: nn.Module | None = None
        self.blocks = adapter.blocks if sharding is None else nn.ModuleList()
        self.teacher = teacher
        self.lr = lr
        self.steps = steps
        self.warmup = warmup
        self.answer_weight = answer_weight
        self.activation_checkpointing = activation_checkpointing
        self.compile_backend = compile_backend
        self._compiled = None if compile_backend is None else CompiledBlocks(self.blocks, compile_backend)
        self.update_codes = update_codes
        self._sizes: dict[str, float] = {}
        trainable_parameters(self.blocks)

    def configure_model(self) -> None:
        """With `sharding`, build the divided copy, once. A tensor without values is refused, before anything is run."""
        if self.sharding is None:
            require_materialized(self.adapter.model)
            return
        if self.student is not None:
            return
        mesh = None if self.device_mesh is None else self.device_mesh["data_parallel"]
        built = build_sharded(self.adapter, self.sharding, divergences, mesh, self.trainer.strategy.root_device)
        self.blocks, self._sizes = built.blocks, built.sizes
        self.student = built.root

    @property
    def purpose(self) -> str:
        """What is trained, for messages."""
        return "end-to-end fine-tuning"

    @property
    def lr_key(self) -> str:
        """The key of the learning rate in a recipe."""
        return "end_to_end.lr"

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        compiled = nullcontext() if self._compiled is None else self._compiled.active()
        with compiled, checkpointed(unwrapped(self.blocks) if self.activation_checkpointing else []):
            loss = self.batch_loss(batch)
        self.log("end_to_end/train_kl", loss, batch_size=1, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """KL of a held-back batch, of plain texts and answers apart."""
        for sums, (mean, tokens) in zip(self._held_back, self._divergences(batch), strict=True):
            sums += torch.tensor([float(mean) * tokens, tokens], dtype=sums.dtype)

    def on_validation_epoch_start(self) -> None:
        """Empty sums of KL and tokens."""
        self._held_back = torch.zeros(2, 2, dtype=torch.float64)

    def on_validation_epoch_end(self) -> None:
        """`val_loss`, the loss of all held-back tokens, is what the best state is kept by."""
        sums = sum_of_all(self._held_back)
        text, answers = (sums[:, 0] / sums[:, 1].clamp_min(1)).tolist()
        same: dict[str, Any] = {"sync_dist": True, "reduce_fx": "max"}  # in all processes: their largest is any of them
        self.log("val_loss", text + self.answer_weight * answers, logger=False, **same)
        self.log("end_to_end/held_back_kl", text, **same)
        self.log("end_to_end/held_back_answer_kl", answers, **same)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam with relative steps, a warm-up, then half a cosine."""
        trained = {plain_name(name): p for name, p in self.blocks.named_parameters() if p.requires_grad}
        sizes = [self._sizes[name] for name in trained] if self.sharding is not None else None
        optimizer = torch.optim.Adam(relative_groups(trained.values(), self.lr, sizes), betas=(0.9, 0.95))
        schedule = warmed_cosine(optimizer, self.steps, self.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """By the norm of all gradients together, those of other processes too."""
        if self.sharding is not None and gradient_clip_val is not None:
            clip_gradients(self.blocks.parameters(), float(gradient_clip_val))
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def batch_loss(self, batch: dict[str, Any]) -> Tensor:
        """KL of plain texts plus the weighted KL of answers of one batch in nats, a scalar.

        Its mean over processes, and that of its gradient, is that of the whole batch.
        """
        (text, text_tokens), (answers, answer_tokens) = self._divergences(batch)
        counts = torch.tensor([text_tokens, answer_tokens], dtype=torch.float32, device=text.device)
        least = 1 / process_count()  # what the mean is where the whole batch has one token; with none, all shares are 0
        text_share, answer_share = counts / mean_of_all(counts).clamp_min(least)
        loss: Tensor = text_share * text + answer_share * self.answer_weight * answers
        return loss

    def _divergences(self, batch: dict[str, Any]) -> list[tuple[Tensor, int]]:
        teacher = [self.teacher[sample] for sample in batch["sample_ids"]] if is_counted(batch) else []
        if self.student is None:
            return divergences(self.adapter, batch, teacher)
        parts: list[tuple[Tensor, int]] = self.student(batch, teacher)
        return parts
