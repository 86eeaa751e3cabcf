"""Whether safetensors files hold what they must: every tensor, in its shape and type, with numbers that can be.

One tensor at a time is in memory.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from casp_pl.allocation import CompressionPlan, ModulePlan
from casp_pl.checkpoint.atomic import METADATA_KEY
from casp_pl.checkpoint.layouts import ExpectedTensor, column_checks, expected_tensors
from casp_pl.checkpoint.reading import read_json
from casp_pl.checkpoint.stored_names import DTYPE_NAMES
from casp_pl.errors import CaspError, IntegrityError
from casp_pl.layers import (
    AdditiveLinear,
    CompressedLinear,
    LatticeLinear,
    LowRankLinear,
    UniformLinear,
    build_layer,
)
from casp_pl.models.weight_files import checked_weight_map, weight_file

__all__ = ["block_problems", "content_problems", "tensor_problem"]

_FLOATS = ("F32", "F16", "BF16")


def content_problems(directory: Path) -> Iterator[str]:
    """Everything in which the weights of a model directory are not what its config says, a sentence each.

    Raises:
        IntegrityError: a config that describes no model, or a file that cannot be read.
    """
    expected = expected_tensors(directory)
    places: dict[str, str] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with weight_file(path) as reader:
            for name in reader.keys():  # noqa: SIM118 - not a mapping
                if name in places:
                    yield f"{path}: {name} lies in {places[name]} as well."
                elif name not in expected:
                    yield f"{path}: {name} is unknown to config.json."
                elif (problem := tensor_problem(reader, name, expected[name])) is not None:
                    yield f"{path}: {name} {problem}."
                places[name] = path.name
    yield from (f"{directory}: {name} is missing." for name in sorted(expected.keys() - places.keys()))
    for index in sorted(directory.glob("*.index.json")):
        if checked_weight_map(index, read_json(index)) != places:
            yield f"{index} does not name the tensors that the files hold."


def tensor_problem(reader: Any, name: str, expected: ExpectedTensor | None) -> str | None:
    """What is wrong with one tensor of an open file, or None.

    Args:
        reader: the file.
        name: of the tensor in it.
        expected: what it must be; None where only its numbers must be finite.
    """
    header = reader.get_slice(name)
    dtype, shape = header.get_dtype(), tuple(header.get_shape())
    if expected is not None:
        allowed = _FLOATS if expected.dtype.is_floating_point else (DTYPE_NAMES[expected.dtype],)
        if shape != expected.shape or dtype not in allowed:
            return f"is {dtype} {shape} instead of {' or '.join(allowed)} {expected.shape}"
    tensor = reader.get_tensor(name)
    broken = tensor.numel() - int(tensor.isfinite().sum()) if tensor.is_floating_point() else 0
    if broken:
        return f"holds {broken} values that are NaN or infinite"
    try:
        if expected is not None and expected.check is not None:
            expected.check(tensor)
    except IntegrityError as error:
        return f"is broken: {error}"
    return None


def block_problems(path: Path, plan: CompressionPlan | None) -> Iterator[str]:
    """Everything in which a block's file of a run is not what its notes and the plan say, a sentence each.

    What is no part of a compressed layer, norms for example, must only be finite.

    Args:
        path: FOLDER/NNN.safetensors, as the pipeline writes it.
        plan: of the run; None where there is none yet.

    Raises:
        IntegrityError: the file cannot be read, or has no notes.
    """
    with weight_file(path) as reader:
        layers = _layers_of(path, reader)
        entries = () if plan is None else plan.of_block(int(path.stem))
        for entry in entries:
            name = entry.name.rpartition(f".layers.{entry.block}.")[2]
            if (problem := _plan_problem(entry, layers.get(name))) is not None:
                yield f"{path}: {name} {problem}."
        expected = _tensors_of(layers)
        present = set(reader.keys())
        for name in sorted(present):
            if name not in expected and any(name.startswith(f"{layer}.") for layer in layers):
                yield f"{path}: {name} is no tensor of its layer."
            elif (problem := tensor_problem(reader, name, expected.get(name))) is not None:
                yield f"{path}: {name} {problem}."
        yield from (f"{path}: {name} is missing." for name in sorted(expected.keys() - present))


def _layers_of(path: Path, reader: Any) -> dict[str, CompressedLinear]:
    """The empty layers that a block's notes describe, by name."""
    try:
        specs = json.loads(json.loads((reader.metadata() or {})[METADATA_KEY])["layers"])
        return {name: build_layer(spec, device="meta") for name, spec in specs.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, CaspError) as error:
        raise IntegrityError(f"{path} does not say of which layers it is made: {error!r}.") from error


def _tensors_of(layers: Mapping[str, CompressedLinear]) -> dict[str, ExpectedTensor]:
    return {
        f"{name}.{key}": ExpectedTensor(tuple(tensor.shape), tensor.dtype, column_checks(layer).get(key))
        for name, layer in layers.items()
        for key, tensor in layer.state_dict().items()
    }


def _plan_problem(entry: ModulePlan, layer: CompressedLinear | None) -> str | None:
    if layer is None:
        return "is in plan.json, but not in the notes"
    parts = (layer.input_factor, layer.output_factor) if isinstance(layer, LowRankLinear) else (layer,)
    bits = {part.bits for part in parts if isinstance(part, AdditiveLinear | LatticeLinear | UniformLinear)}
    rank = layer.rank if isinstance(layer, LowRankLinear) else None
    there = ((layer.out_features, layer.in_features), rank, *sorted(bits or {entry.bits}))
    planned = (entry.shape, entry.rank, entry.bits)
    return None if there == planned else f"is {there} (shape, rank, bits) instead of {planned} as in plan.json"
