"""What is trained of a model in 16 bits is float32 meanwhile."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from casp_pl.data.calibration import CalibrationData
from casp_pl.models import adapt
from casp_pl.models.streams import first_block_batches, run_block
from casp_pl.models.tiny import load_tiny
from casp_pl.modules import BlockwiseModule
from casp_pl.modules.widening import widened
from casp_pl.pipeline.footprint import BlockShape
from casp_pl.quantizers import GPTQQuantizer, RTNQuantizer


def test_parameters_and_buffers_are_wide_inside_and_rounded_back() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(torch.bfloat16)
    wide = nn.Linear(4, 2)
    both = nn.ModuleList([model, wide])
    trained, counted = model[0].weight, model[1].num_batches_tracked
    before = {name: tensor.dtype for name, tensor in both.state_dict().items()}
    with widened(both):
        assert {t.dtype for t in both.state_dict().values()} == {torch.float32, torch.int64}
        assert model[0].weight is trained, "an optimizer knows it"
        with torch.no_grad():
            trained.fill_(1 + 2.0**-12)
            wide.weight.fill_(1 + 2.0**-12)
    assert {name: tensor.dtype for name, tensor in both.state_dict().items()} == before
    assert model[1].num_batches_tracked is counted
    assert trained.unique().item() == 1.0
    assert wide.weight.unique().item() == 1 + 2.0**-12


def test_the_forecast_counts_what_widening_takes() -> None:
    adapter = adapt(load_tiny()[0].to(torch.bfloat16))
    shape = BlockShape.of(adapter)
    for block in adapter.blocks:
        for name in adapter.linear_names:
            weight = block.get_submodule(name).weight.float()
            block.set_submodule(name, RTNQuantizer().quantize(weight, torch.eye(weight.shape[1]), bits=2))
    before = sum(parameter.nbytes for parameter in adapter.model.parameters())
    with widened(adapter.model):
        assert sum(parameter.nbytes for parameter in adapter.model.parameters()) - before == shape.widening > 0
    assert dataclasses.replace(shape, model_bytes=2 * shape.model_bytes, itemsize=4).widening == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tuning_a_narrow_block_is_tuning_the_wide_one(dtype: torch.dtype) -> None:
    """Loss and gradients of a block in 16 bits, widened, are those of the same block cast to float32."""
    model, processor = load_tiny()
    adapter = adapt(model.to(dtype))
    data = CalibrationData(samples=8, fine_tuning_samples=8, text_length=48, batch_size=4)
    data.attach(processor)
    batches = first_block_batches(adapter, list(data.calibration_dataloader())[:2])
    block = copy.deepcopy(adapter.blocks[0])
    for name in adapter.linear_names:
        weight = block.get_submodule(name).weight.float()
        block.set_submodule(name, GPTQQuantizer().quantize(weight, torch.eye(weight.shape[1]), bits=2))
    with torch.no_grad():
        pairs = [(batch, run_block(adapter.blocks[0], batch)) for batch in batches]
    narrow = BlockwiseModule([block], pairs, [])
    wide = BlockwiseModule([copy.deepcopy(block).float()], [(_cast(batch), target) for batch, target in pairs], [])
    expected = wide.batch_loss((_cast(pairs[0][0]), pairs[0][1]))
    expected.backward()
    with widened(narrow):
        loss = narrow.batch_loss(pairs[0])
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.item() == expected.item() > 0
        for (name, mine), other in zip(narrow.named_parameters(), wide.parameters(), strict=True):
            if mine.requires_grad:
                assert torch.equal(mine.grad, other.grad), name
                mine.grad = None


def _cast(batch):  # type: ignore[no-untyped-def]
    """By hand: hidden states, masks and rotary embeddings in float32."""
    arguments = dict(batch.arguments)
    for name, value in arguments.items():
        if isinstance(value, tuple):
            arguments[name] = tuple(item.float() for item in value)
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            arguments[name] = value.float()
    return dataclasses.replace(batch, hidden=batch.hidden.float(), arguments=arguments)
