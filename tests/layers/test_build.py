"""Skeletons from specs, also in a process that never saw the layer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from casp_pl.errors import IntegrityError
from casp_pl.layers import AdditiveLinear, LatticeLinear, LowRankLinear, UniformLinear, build_layer

ADDITIVE = AdditiveLinear(in_features=13, out_features=6, num_codebooks=2, entries=8, bias=True).spec()
UNIFORM = UniformLinear(in_features=13, out_features=6, bits=3, group_size=4).spec()
LATTICE = LatticeLinear(in_features=13, out_features=6, bits=3, bias=True).spec()
REGROUPED = UniformLinear(in_features=13, out_features=6, bits=3, group_size=4, regrouped=True).spec()
DENSE = {"kind": "dense", "in_features": 13, "out_features": 6, "bias": False}
KINDS = {"additive": ADDITIVE, "lattice": LATTICE, "uniform": UNIFORM, "regrouped": REGROUPED}


@pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS.keys())
def test_skeletons_know_their_size_without_memory(spec: dict[str, object]) -> None:
    skeleton = build_layer(json.loads(json.dumps(spec)), device="meta")
    assert skeleton.codes.is_meta
    assert skeleton.spec() == spec
    assert skeleton.storage_bits == build_layer(spec).storage_bits


def test_dense_layers_are_ordinary_ones() -> None:
    layer = build_layer(DENSE, dtype=torch.float64)
    assert type(layer) is nn.Linear
    assert layer.bias is None
    assert layer.weight.shape == (6, 13)
    assert layer.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "fractal"}, "unknown kind of layer: 'fractal'"),
        ({"colour": 3}, "broken description of a layer of kind additive"),
        ({"in_features": "many"}, "broken description of a layer of kind additive"),
    ],
)
def test_broken_specs_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        build_layer({**ADDITIVE, **change})


def test_a_low_rank_spec_that_contradicts_its_factors_is_refused() -> None:
    factors = {"input_factor": DENSE, "output_factor": {**DENSE, "in_features": 6, "out_features": 9}}
    spec = {"kind": "low_rank", "in_features": 13, "out_features": 9, "bias": False, "rank": 6, **factors}
    assert build_layer(spec).spec() == spec
    with pytest.raises(IntegrityError, match="in_features, rank contradict the factors"):
        build_layer({**spec, "in_features": 14, "rank": 7})
    with pytest.raises(IntegrityError, match="broken description"):
        build_layer({key: value for key, value in spec.items() if key != "output_factor"})


def test_round_trip_through_safetensors_in_a_fresh_process(tmp_path: Path) -> None:
    first = AdditiveLinear(in_features=13, out_features=6, num_codebooks=2, entries=8)
    second = UniformLinear(in_features=6, out_features=9, bits=3, group_size=4, bias=True)
    layer = LowRankLinear(input_factor=first, output_factor=second)
    generator = torch.Generator().manual_seed(0)
    first.set_codes(torch.randint(0, 8, (6, 2, 2), generator=generator))
    second.set_codes(torch.randint(0, 8, (9, 6), generator=generator))
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    layer.round_to_storage()
    x = torch.randn(4, 13, generator=generator)
    state = {name: value.half() if value.is_floating_point() else value for name, value in layer.state_dict().items()}
    state["output_factor.bias"] = layer.bias.detach()
    save_file({**state, "x": x}, tmp_path / "layer.safetensors", metadata={"spec": json.dumps(layer.spec())})
    program = (
        "import json, sys; from safetensors import safe_open; from safetensors.torch import save_file\n"
        "from casp_pl.layers import build_layer\n"
        "with safe_open(sys.argv[1], 'pt') as file:\n"
        "    spec, state = json.loads(file.metadata()['spec']), {name: file.get_tensor(name) for name in file.keys()}\n"
        "x, layer = state.pop('x'), build_layer(spec)\n"
        "layer.load_state_dict(state)\n"
        "save_file({'y': layer(x).detach(), 'weight': layer.dequantize().detach().contiguous()}, sys.argv[2])\n"
    )
    command = [sys.executable, "-c", program, tmp_path / "layer.safetensors", tmp_path / "y.safetensors"]
    subprocess.run(command, check=True, timeout=120, cwd=Path(__file__).parents[2])
    again = load_file(tmp_path / "y.safetensors")
    # sums of a product may be taken in another order where memory is aligned otherwise
    torch.testing.assert_close(again["weight"], layer.dequantize(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(again["y"], layer(x), rtol=1e-5, atol=1e-4)
