"""The uniform kernel against a loop."""

import pytest
import torch

from casp_pl.kernels.uniform import dequantize_uniform, uniform_steps


@pytest.mark.parametrize(("columns", "group_size"), [(12, 4), (13, 4), (3, 64), (7, 1)])
def test_weight_is_steps_times_scale(columns: int, group_size: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    groups = -(-columns // group_size)
    codes = torch.randint(0, 256, (5, columns), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 256, (5, groups), generator=generator, dtype=torch.uint8)
    scales = torch.rand(5, groups, generator=generator, dtype=torch.float64)
    weight = dequantize_uniform(uniform_steps(codes, zeros, group_size), scales, columns)
    assert weight.shape == (5, columns)
    for o in range(5):
        for i in range(columns):
            g = i // group_size
            assert weight[o, i].item() == (int(codes[o, i]) - int(zeros[o, g])) * scales[o, g].item()
