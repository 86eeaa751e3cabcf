from collections import Counter

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from casp_pl.data.loaders import FixedLoader, StatefulLoader, rank_batches
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


@pytest.mark.parametrize(
    ("samples", "batch_size", "world_size"), [(11, 3, 1), (11, 3, 2), (2, 4, 3), (1, 1, 4), (12, 2, 3)]
)
def test_every_rank_makes_the_same_steps_and_nothing_is_lost(samples, batch_size, world_size):
    order = list(range(samples))
    ranks = [rank_batches(order, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = Counter(number for batches in ranks for batch in batches for number in batch)
    assert set(seen) == set(order)
    if samples % (batch_size * world_size) % world_size == 0:
        assert set(seen.values()) == {1}
    assert all(1 <= len(batch) <= batch_size for batches in ranks for batch in batches)


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
    parts = [ids(loader(seed=2, rank=rank, world_size=2)) for rank in range(2)]
    assert sorted(number for part in parts for batch in part for number in batch) == [*range(11)]


def test_fixed_loader_repeats():
    batches = FixedLoader([[1, 2], [3]], collate)
    assert len(batches) == 2
    assert ids(batches) == ids(batches) == [[1, 2], [3]]


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
