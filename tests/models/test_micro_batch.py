"""Where memory runs out, halves of a batch give what the whole gives."""

import json
import multiprocessing
import os
import resource
import subprocess
import sys
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from casp_pl.errors import ResourceError
from casp_pl.models import ModelAdapter
from casp_pl.models.micro_batch import in_halves, is_out_of_memory
from casp_pl.models.streams import first_block_batches, linear_inputs, run_blocks, run_blocks_seeing


def no_room_for_more_than(block: nn.Module, samples: int) -> Any:
    """A device whose memory holds the block's activations of so many samples."""

    def refuse(_: nn.Module, positional: tuple[torch.Tensor, ...]) -> None:
        if len(positional[0]) > samples:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return block.mlp.gate_proj.register_forward_pre_hook(refuse)


@pytest.mark.parametrize("room", [1, 2])
def test_halves_give_what_the_whole_gives(adapter: ModelAdapter, batches: list[dict[str, Any]], room: int) -> None:
    block, names = adapter.blocks[0], adapter.group_heads
    streams = first_block_batches(adapter, batches)  # two samples, and three of unequal length
    whole, seen = run_blocks_seeing(block, streams, names)
    handle = no_room_for_more_than(block, room)
    parts, seen_in_parts = run_blocks_seeing(block, streams, names)
    again = run_blocks(block, streams)
    alone = [linear_inputs(block, stream, names) for stream in streams]
    handle.remove()
    for number, (one, other) in enumerate(zip(whole, parts, strict=True)):
        torch.testing.assert_close(other.hidden, one.hidden)
        torch.testing.assert_close(again[number].hidden, one.hidden)
        for name in names:
            torch.testing.assert_close(seen_in_parts[number][name], seen[number][name])
            torch.testing.assert_close(alone[number][name], seen[number][name])


def test_one_sample_that_is_too_much_says_what_to_lower(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    no_room_for_more_than(adapter.blocks[0], 0)
    with pytest.raises(ResourceError, match=r"single sample.\nLower data.max_length"):
        run_blocks(adapter.blocks[0], first_block_batches(adapter, batches))


def test_other_errors_are_not_taken_for_want_of_memory(adapter: ModelAdapter, batches: list[dict[str, Any]]) -> None:
    (stream, _) = first_block_batches(adapter, batches)

    def broken(_: object) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        in_halves(broken, stream, torch.cat)


def _allocate_too_much(sender: Any) -> None:
    limit = psutil.Process().memory_info().vms + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        torch.empty(64 << 30, dtype=torch.uint8)  # more than a large process could have free
    except RuntimeError as error:
        sender.send(is_out_of_memory(error))


def test_the_refusal_of_the_kernel_is_recognised() -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_allocate_too_much, args=(sender,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert receiver.poll()
    assert receiver.recv()


class _Wide(nn.Module):
    """A block with an inner layer of 64 MiB a sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 1 << 16, bias=False), nn.Linear(1 << 16, 16, bias=False)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = self.down(self.up(x))
        return inner


class _Samples:
    """A batch of the smallest kind."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def halves(self) -> tuple["_Samples", "_Samples"]:
        middle = len(self.x) // 2
        return _Samples(self.x[:middle]), _Samples(self.x[middle:])


def _run_short_of_memory(samples: int, free: int) -> tuple[list[int], bool | str]:
    """In a process of its own: what earlier tests have freed would be had again. Sizes of what was computed, result."""
    block, x, sizes = _Wide(), torch.linspace(-1, 1, samples * 256 * 16).view(samples, 256, 16), []

    def work(batch: _Samples) -> torch.Tensor:
        result: torch.Tensor = block(batch.x)
        sizes.append(len(batch))
        return result

    block(x[:1, :1])  # what the libraries set up at the first call
    limit = psutil.Process().memory_info().vms + free
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        y = in_halves(work, _Samples(x), torch.cat)
    except ResourceError as error:
        return sizes, str(error)
    return sizes, torch.equal(y, torch.cat([block(sample[None]) for sample in x]))


@pytest.mark.parametrize(
    ("free", "sizes", "said"),
    [(160 << 20, [2, 2], True), (96 << 20, [1, 1, 1, 1], True), (32 << 20, [], "single sample")],
)
def test_memory_that_really_runs_out_is_met_with_halves(free: int, sizes: list[int], said: bool | str) -> None:
    command, environment = [sys.executable, __file__, str(free)], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
    found, result = json.loads(done.stdout.splitlines()[-1])
    assert found == sizes
    assert result is True if said is True else str(said) in result


if __name__ == "__main__":
    print(json.dumps(_run_short_of_memory(4, int(sys.argv[1]))))
