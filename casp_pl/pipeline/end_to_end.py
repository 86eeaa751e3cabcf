"""The end-to-end stage: all compressed blocks trained together, by one process or several; end_to_end/NNN.safetensors.

Several hold the whole model each (DDP), or a part of its parameters (FSDP); the files are the same. A stage that was
stopped goes on from its last checkpoint, bit by bit as if it had not been stopped.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from casp_pl.callbacks import Advance, BestState, CodebookUpdate, StageCheckpoint
from casp_pl.checkpoint import RunDirectory
from casp_pl.console import RunProgress
from casp_pl.data.loaders import StatefulLoader
from casp_pl.models.activations import Keep
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.streams import autocast_to
from casp_pl.models.surgery import round_to_storage
from casp_pl.modules import EndToEndModule
from casp_pl.modules.end_to_end import teacher_states
from casp_pl.modules.sharding import Sharding, Wrapping, parked, trained_parts, whole_tensors
from casp_pl.modules.widening import widened
from casp_pl.pipeline.block_files import BlockFiles, block_name, save_block
from casp_pl.pipeline.blocks import Batches
from casp_pl.pipeline.broken_samples import BrokenSamples
from casp_pl.pipeline.prepare import load_batches
from casp_pl.pipeline.settings import RunSettings
from casp_pl.pipeline.strategies import sharded_strategy, wrapping_of
from casp_pl.pipeline.trainers import TrainerFactory, as_loader
from casp_pl.processes import process_count

__all__ = ["CHECKPOINTS", "FOLDER", "EndToEndStage"]

FOLDER = "end_to_end"
CHECKPOINTS = f"{FOLDER}/steps"


class EndToEndStage:
    """Trains the blocks of one run and writes them.

    Args:
        settings: the recipe.
        run: where blocks and checkpoints are kept.
        adapter: the original model.
        trainers: makes the Trainers.
        progress: shows the steps.
        broken: leaves out samples on which the original breaks down.
        keep: keeps activations.
        saved: is called when a checkpoint is there.
    """

    def __init__(
        self,
        settings: RunSettings,
        run: RunDirectory,
        adapter: ModelAdapter,
        trainers: TrainerFactory,
        progress: RunProgress,
        broken: BrokenSamples,
        keep: Keep,
        saved: Callable[[], None] | None = None,
    ) -> None:
        self.settings = settings
        self.run = run
        self.adapter = adapter
        self.trainers = trainers
        self.progress = progress
        self.broken = broken
        self.keep = keep
        self.arguments = dict(settings.end_to_end)
        self.steps: int = self.arguments["steps"]
        self.wrapping = wrapping_of(trainers.settings)
        best = BestState(codes=self.arguments["update_codes"])
        self.checkpoint = StageCheckpoint(
            run,
            best,
            folder=CHECKPOINTS,
            every=self.arguments.pop("checkpoint_every"),
            layout=f"{self.wrapping} {process_count()}" if self.wrapping else "whole",
            divided=self.wrapping is not None,
            saved=saved,
        )
        self.callbacks: list[pl.Callback] = [best, Advance(progress.advance, loop="train"), self.checkpoint]
        if self.arguments["update_codes"]:
            self.callbacks.insert(1, CodebookUpdate(**settings.codebook_update))

    def fit(self, blocks: BlockFiles, held_back: Batches) -> None:
        """Train the blocks of the stage before, and write them.

        Args:
            blocks: of the stage before; trained as they are, not rounded.
            held_back: batches that the best state is chosen by.
        """
        trainer, blocks = self._trainer(), blocks.as_trained()
        self.progress.recall(self.checkpoint.step)
        teacher, held_back = self._teacher(trainer, held_back)
        pl.seed_everything(self.settings.seed, verbose=False)
        if self.wrapping is None:
            trained: Iterable[nn.Module] = self._train_whole(trainer, teacher, held_back, list(blocks))
        else:
            trained = self._train_divided(trainer, teacher, held_back, blocks, self.wrapping)
        for number, block in enumerate(trained):
            round_to_storage(block)
            save_block(self.run, block_name(FOLDER, number), block.eval().requires_grad_(False))

    def _trainer(self) -> pl.Trainer:
        overrides: dict[str, Any] = {"precision": self.trainers.working_precision}
        if self.wrapping is not None:
            # the divided model casts by itself; tensors made in inference mode cannot be gathered into
            overrides = {"precision": "32-true", "inference_mode": False, "strategy": sharded_strategy(self.wrapping)}
        return self.trainers.make(
            callbacks=self.callbacks,
            max_steps=self.steps,
            max_epochs=-1,
            num_sanity_val_steps=0,
            val_check_interval=max(1, self.steps // 4),
            check_val_every_n_epoch=None,
            log_every_n_steps=1,
            gradient_clip_val=1.0,
            **overrides,
        )

    def _teacher(self, trainer: pl.Trainer, held_back: Batches) -> tuple[dict[str, Tensor], Batches]:
        """What the original gives for the batches that are still to come, and those of them that are held back.

        Samples on which it breaks down are left out of both.
        """
        while True:
            divided = autocast_to(self.trainers.autocast, self.adapter.device)
            with trainer.precision_plugin.forward_context() if self.wrapping is None else divided:
                batches = chain(_Steps(self.settings.data.train_dataloader(), 0, self.steps), held_back)
                needed = self._still_to_come(held_back)
                teacher = teacher_states(self.adapter, batches, self.keep, needed=needed)
            if not self.broken.leave_out([name for name, states in teacher.items() if not states.isfinite().all()]):
                return teacher, held_back
            held_back = load_batches(self.settings, self.adapter.device).held_back

    def _still_to_come(self, held_back: Batches) -> set[str] | None:
        """Samples of the steps that are left and of what is held back; None where the stage begins: all."""
        if self.checkpoint.step == 0:
            return None
        left = _Steps(self.settings.data.train_dataloader(), self.checkpoint.step, self.steps)
        return {name for batch in chain(left, held_back) for name in batch["sample_ids"]}

    def _train(self, trainer: pl.Trainer, module: EndToEndModule, held_back: Batches) -> None:
        if self.checkpoint.step == 0:  # the state before training competes for the best
            trainer.validate(module, dataloaders=as_loader(held_back), verbose=False)
        # Lightning warns of a loader without a batch; after the last step it takes none
        first = min(self.checkpoint.step, self.steps - 1)
        batches: Any = _Steps(self.settings.data.train_dataloader(), first, self.steps)
        trainer.fit(module, train_dataloaders=batches, val_dataloaders=as_loader(held_back))

    def _train_whole(
        self, trainer: pl.Trainer, teacher: Mapping[str, Tensor], held_back: Batches, blocks: list[nn.Module]
    ) -> list[nn.Module]:
        with self.adapter.with_blocks(blocks), widened(self.adapter.model):
            self._train(trainer, EndToEndModule(self.adapter, teacher, **self.arguments), held_back)
        return blocks

    def _train_divided(
        self,
        trainer: pl.Trainer,
        teacher: Mapping[str, Tensor],
        held_back: Batches,
        blocks: BlockFiles,
        wrapping: Wrapping,
    ) -> Iterator[nn.Module]:
        """Blocks are read one at a time, and put together again one at a time."""
        sharding = Sharding(wrapping, blocks.__getitem__, self.trainers.autocast)
        module = EndToEndModule(self.adapter, teacher, sharding=sharding, **self.arguments)
        with parked(self.adapter.model):
            self._train(trainer, module, held_back)
        for number, parts in enumerate(module.blocks):
            block = blocks[number]
            shapes = {name: tensor.shape for name, tensor in block.state_dict().items()}
            block.load_state_dict(whole_tensors(trained_parts(parts), shapes), strict=False)
            yield block


class _Steps:
    """The batches of the steps `first` to `last` of training, over as many epochs as that takes."""

    def __init__(self, loader: StatefulLoader[Any], first: int, last: int) -> None:
        self.loader = loader
        self.first = first
        self.last = last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, position = divmod(self.first, len(self.loader))
        self.loader.load_state_dict(self.loader.state_dict() | {"epoch": epoch, "position": position})
        return islice(chain.from_iterable(self.loader for _ in range(self.last)), len(self))
