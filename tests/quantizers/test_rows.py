"""Processes that search the rows of one weight together find what one finds alone."""

import subprocess
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from casp_pl.processes import RowShare

ROWS = """
import torch
import torch.distributed as dist
from casp_pl.processes import RowShare, of_all, process_rank
from casp_pl.quantizers import AQLMQuantizer, GPTQQuantizer, QuIPSharpQuantizer, RTNQuantizer
from casp_pl.quantizers.low_rank import quantize_low_rank

dist.init_process_group("gloo")
generator = torch.Generator().manual_seed(3)
quantizers = [RTNQuantizer(), GPTQQuantizer(group_size=16), QuIPSharpQuantizer(), AQLMQuantizer(max_rounds=4)]
for rows, columns in ((37, 50), (20, 96), (97, 96), (2, 24), (64, 576), (301, 512)):
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(3 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    moment = inputs.T @ inputs
    for quantizer in quantizers:
        alone, shared = (quantizer.quantize(weight, moment, bits=2, together=together) for together in (False, True))
        for name, tensor in alone.state_dict().items():
            assert torch.equal(shared.state_dict()[name], tensor), (quantizer.name, rows, name)
        everyones = of_all(shared.state_dict())
        assert all(torch.equal(own[name], tensor) for own in everyones for name, tensor in shared.state_dict().items())
weight = torch.randn(41, 32, generator=generator)
alone, shared = (quantize_low_rank(weight, torch.eye(32), 16, quantizers[-1], together=t) for t in (False, True))
assert torch.equal(alone.dequantize(), shared.dequantize())
for count, dim in ((7, 0), (7, 1), (1, 0)):
    share, whole = RowShare(count, together=True), torch.arange(3.0 * count).view(3, count).movedim(1, dim)
    assert torch.equal(share.join(whole.narrow(dim, share.own.start, share.own.stop - share.own.start), dim), whole)
    rows = torch.randn(count, 3, generator=generator)
    totals = []
    for share in (RowShare(count), RowShare(count, together=True)):
        parts = torch.tensor_split(rows[share.own], share.bounds[1:-1])
        totals.append(share.sum(torch.stack([part.sum(dim=0) for part in parts])))
    assert torch.equal(*totals), count
    assert torch.allclose(totals[0], rows.sum(dim=0), atol=1e-6), count
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_rows_are_the_same_whoever_searches_them(
    count: int,
    start_together: Callable[..., list[subprocess.Popen[bytes]]],
    finish_together: Callable[..., None],
) -> None:
    processes = start_together(["-c", ROWS], count)
    finish_together(processes)
    assert [process.returncode for process in processes] == [0] * count, "ROWS asserts"


def test_a_single_process_has_all_rows() -> None:
    assert not dist.is_initialized()
    for together in (False, True):
        share, part = RowShare(5, together), torch.arange(5)
        assert share.own == slice(0, 5)
        assert share.join(part) is part
