from collections import Counter

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from casp_pl.data.loaders import FixedLoader, Share, StatefulLoader, dealt_out, divided, in_batches
from casp_pl.errors import ConfigError


def collate(samples):
    return {"x": torch.tensor(samples, dtype=torch.float32)[:, None], "ids": list(samples)}


class Item(int):
    """A sample that is its own number, with a length."""

    def __len__(self):
        return self * 7 % 5


def loader(samples=11, batch_size=3, **settings):
    return StatefulLoader([Item(number) for number in range(samples)], collate, batch_size=batch_size, **settings)


def ids(batches):
    return [batch["ids"] for batch in batches]


SIZES = [(11, 3, 1), (11, 3, 2), (2, 4, 3), (1, 1, 4), (12, 2, 3), (13, 6, 4)]


@pytest.mark.parametrize("share", [divided, dealt_out])
@pytest.mark.parametrize(("samples", "batch_size", "world_size"), SIZES)
def test_every_rank_makes_the_same_steps_and_every_sample_counts_once(share, samples, batch_size, world_size):
    batches = in_batches(range(samples), batch_size)
    ranks = [share(batches, rank, world_size) for rank in range(world_size)]
    assert len({len(own) for own in ranks}) == 1
    assert all(part.samples for own in ranks for part in own)
    counted = Counter(number for own in ranks for part in own if part.counted for number in part.samples)
    assert counted == Counter(range(samples))


def test_batches_are_what_they_are_in_one_process():
    batches = in_batches(range(11), 3)
    steps = zip(*(divided(batches, rank, 2) for rank in range(2)), strict=True)
    assert [sorted(sum((list(part.samples) for part in step if part.counted), [])) for step in steps] == list(
        map(list, batches)
    )
    whole = [part.samples for rank in range(3) for part in dealt_out(batches, rank, 3) if part.counted]
    assert sorted(map(list, whole)) == list(map(list, batches))


def test_epochs_are_complete_and_differ():
    stream = loader(seed=3)
    first, second = ids(stream), ids(stream)
    assert len(first) == len(second) == len(stream) == 4
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(11))
    assert first != second
    again = loader(seed=3)
    assert [ids(again), ids(again)] == [first, second]
    assert ids(loader(seed=4)) != first


@pytest.mark.parametrize("after", range(9))
def test_resume_goes_on_with_the_next_batch(after):
    whole = loader(seed=1)
    expected = ids(whole) + ids(whole) + ids(whole)
    first = loader(seed=1)
    seen = []
    while len(seen) < after:
        for batch in first:
            seen.append(batch["ids"])
            if len(seen) == after:
                break
    state = first.state_dict()
    resumed = loader(seed=1)
    resumed.load_state_dict(state)
    while len(seen) < len(expected):
        seen += ids(resumed)
    assert seen == expected


def test_a_state_of_other_data_is_refused():
    state = loader(samples=11).state_dict()
    with pytest.raises(ConfigError, match="samples was 11 and is 12 now"):
        loader(samples=12).load_state_dict(state)
    with pytest.raises(ConfigError, match="seed was 0 and is 5 now"):
        loader(seed=5).load_state_dict(state)


def test_ranks_share_an_epoch():
    alone = ids(loader(seed=2))
    parts = [ids(loader(seed=2, rank=rank, world_size=2)) for rank in range(2)]
    assert [sorted(one + other) for one, other in zip(*parts, strict=True)] == [sorted(batch) for batch in alone]


def test_a_rank_that_nothing_is_left_for_gets_what_does_not_count():
    last = list(loader(samples=4, batch_size=3, rank=1, world_size=2))
    assert sorted(batch.get("counted", True) for batch in last) == [False, True]


def test_fixed_loader_repeats():
    batches = FixedLoader([Share([1, 2]), Share([3], counted=False)], collate)
    assert len(batches) == 2
    assert ids(batches) == ids(batches) == [[1, 2], [3]]
    assert [batch.get("counted", True) for batch in batches] == [True, False]


class Recorder(pl.LightningModule):
    """A linear model that writes down what it was trained on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["ids"])
        return self.layer(batch["x"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class SaveEveryStep(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/step={trainer.global_step}.ckpt")


def train(folder, max_steps, checkpoint=None):
    module = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        default_root_dir=folder,
        callbacks=[SaveEveryStep()],
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(seed=7), ckpt_path=checkpoint, weights_only=True)
    return module


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")  # lightning 2.6.6 on torch 2.13
def test_lightning_resumes_bit_identically_in_the_middle_and_at_the_end_of_an_epoch(tmp_path):
    whole = train(tmp_path / "whole", 10)  # 4 batches an epoch
    for step in (3, 4, 6):
        resumed = train(tmp_path / "resumed", 10, tmp_path / "whole" / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[step:]
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_samples_of_like_length_share_a_batch():
    batches = ids(StatefulLoader([Item(number) for number in range(64)], collate, batch_size=8))
    lengths = [[len(Item(number)) for number in batch] for batch in batches]
    spread = [max(batch) - min(batch) for batch in lengths]
    assert sum(spread) <= 8, "64 samples of 5 lengths, sorted, change length only 4 times"
    assert [min(batch) for batch in lengths] != sorted(min(batch) for batch in lengths)
