"""The uniform kernel against a loop, and its backward pass."""

import pytest
import torch
from torch import Tensor

from casp_pl.kernels.packing import pack
from casp_pl.kernels.uniform import UniformCodes, dequantize_uniform

SHAPES = [(12, 4), (13, 4), (3, 64), (7, 1), (40, 16), (24, 64), (72, 24)]  # the last three are decoded in whole units


def _case(columns: int, group_size: int, bits: int) -> tuple[UniformCodes, Tensor, Tensor]:
    """Codes, the same unpacked, scales."""
    generator = torch.Generator().manual_seed(columns + bits)
    groups = -(-columns // group_size)
    numbers = torch.randint(0, 1 << bits, (5, columns), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (5, groups), generator=generator, dtype=torch.uint8)
    scales = torch.rand(5, groups, generator=generator)
    return UniformCodes(pack(numbers, bits), zeros, bits, group_size, columns), numbers, scales


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("columns", "group_size"), SHAPES)
def test_weight_is_steps_times_scale(columns: int, group_size: int, bits: int, dtype: torch.dtype) -> None:
    codes, numbers, scales = _case(columns, group_size, bits)
    scales = scales.to(dtype)
    weight = dequantize_uniform(codes, scales)
    assert weight.shape == (5, columns)
    for o in range(5):
        for i in range(columns):
            g = i // group_size
            assert weight[o, i].item() == ((int(numbers[o, i]) - int(codes.zeros[o, g])) * scales[o, g]).item()


@pytest.mark.parametrize(("columns", "group_size"), SHAPES)
def test_gradients_of_scales(columns: int, group_size: int) -> None:
    codes, _, scales = _case(columns, group_size, 3)
    wide = scales.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: dequantize_uniform(codes, s), wide)
    pull = torch.randn(5, columns, dtype=torch.float64)
    wanted = torch.autograd.grad((dequantize_uniform(codes, wide) * pull).sum(), wide)[0]
    narrow = scales.clone().requires_grad_()
    found = torch.autograd.grad((dequantize_uniform(codes, narrow) * pull.float()).sum(), narrow)[0]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("columns", "group_size"), SHAPES)
def test_torch_alone_gives_the_same_bits(columns: int, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, _, scales = _case(columns, group_size, 2)
    compiled_weight = dequantize_uniform(codes, scales)
    monkeypatch.setattr("casp_pl.kernels.uniform.weight_loops", lambda *_: None)
    assert torch.equal(dequantize_uniform(codes, scales), compiled_weight)
