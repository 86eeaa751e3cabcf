import pytest
import torch
from torch import nn

from casp_pl.checkpoint import save_compressed
from casp_pl.layers.additive import AdditiveLinear
from casp_pl.layers.low_rank import LowRankLinear
from casp_pl.models.tiny import load_tiny
from casp_pl.quantizers import RTNQuantizer


@pytest.fixture(scope="session")
def llava():
    """A tiny LLaVA with compressed linears of every kind, and its processor. Tests leave it as it is."""
    torch.manual_seed(0)
    model, processor = load_tiny()
    _compress(model.model.language_model.layers)
    return model.eval(), processor


@pytest.fixture(scope="session")
def saved(llava, tmp_path_factory):
    """The directory that `save_compressed` made of `llava`."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    save_compressed(*llava, directory, card="# A card\n")
    return directory


def _quantized(weight, bits):
    return RTNQuantizer(group_size=16).quantize(weight.detach(), torch.eye(weight.shape[1]), bits=bits)


def _additive(in_features, out_features):
    layer = AdditiveLinear.from_codes(
        torch.randint(16, (out_features, -(-in_features // 8), 2)),
        torch.randn(2, 16, 8),
        torch.rand(out_features, 1),
        in_features=in_features,
    )
    layer.round_to_storage()
    return layer


def _product(weight, rank):
    u, s, vt = torch.linalg.svd(weight.detach(), full_matrices=False)
    return LowRankLinear(
        input_factor=_quantized(s[:rank, None] * vt[:rank], 3), output_factor=_quantized(u[:, :rank], 3)
    )


def _compress(blocks):
    """q and k low-rank, the MLP uniform, one additive layer, one product with a dense factor; v and o stay."""
    for block in blocks:
        for name in ("q_proj", "k_proj"):
            setattr(block.self_attn, name, _product(getattr(block.self_attn, name).weight, rank=8))
        for name, bits in (("gate_proj", 2), ("up_proj", 3), ("down_proj", 4)):
            setattr(block.mlp, name, _quantized(getattr(block.mlp, name).weight, bits))
    first, last = blocks[0], blocks[-1]
    first.self_attn.o_proj = _additive(first.self_attn.o_proj.in_features, first.self_attn.o_proj.out_features)
    last.self_attn.v_proj = LowRankLinear(
        input_factor=nn.Linear(last.self_attn.v_proj.in_features, 4, bias=False),
        output_factor=nn.Linear(4, last.self_attn.v_proj.out_features, bias=False),
    )
