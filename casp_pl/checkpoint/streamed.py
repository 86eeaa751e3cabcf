"""A compressed model written one decoder block at a time: it is never in memory as a whole."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from casp_pl.checkpoint.atomic import write_json
from casp_pl.checkpoint.directory import write_directory
from casp_pl.checkpoint.hugging_face import without_progress_bars, write_beside
from casp_pl.checkpoint.model_directory import CONFIG_NAME
from casp_pl.checkpoint.reading import read_json
from casp_pl.checkpoint.stored_names import compact_state_dict
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.surgery import layer_specs
from casp_pl.models.weight_files import weight_file

__all__ = ["file_names", "save_streamed", "write_index"]

_INDEX = "model.safetensors.index.json"


def save_streamed(
    adapter: ModelAdapter,
    blocks: Sequence[nn.Module],
    processor: Any,
    out_dir: Path | str,
    *,
    card: str,
    half: torch.dtype = torch.float16,
) -> None:
    """What `save_compressed` writes, in one file for each block and one for everything else.

    Args:
        adapter: the original model.
        blocks: its compressed blocks; each is asked for twice, and let go before the next.
        processor: the model's processor or tokenizer, saved beside it; None for none.
        out_dir: the directory; an older compressed model there is replaced.
        card: text of README.md, the model card.
        half: `half_of` the original.

    Raises:
        ResourceError: the disk is full, the place cannot be written, or something else lies there.
    """
    size = sum(parameter.nbytes for parameter in adapter.outside_parameters())
    size += sum(tensor.nbytes for block in blocks for tensor in block.state_dict().values())
    write_directory(out_dir, lambda directory: _write(adapter, blocks, processor, directory, card, half), size=size)


def _write(
    adapter: ModelAdapter, blocks: Sequence[nn.Module], processor: Any, directory: Path, card: str, half: torch.dtype
) -> None:
    from transformers.core_model_loading import revert_weight_conversion

    files = file_names(len(blocks))
    places: dict[str, str] = {}
    total = 0
    with adapter.with_blocks([]), without_progress_bars():
        outside = compact_state_dict(adapter.model, half)
        adapter.model.save_pretrained(directory, state_dict=outside, max_shard_size="1TB")
        (directory / "model.safetensors").rename(directory / files[0])
    for name, length in _stored(directory / files[0]).items():
        places[name] = files[0]
        total += length
    modules: dict[str, dict[str, Any]] = {}
    for number, (block, file) in enumerate(zip(blocks, files[1:], strict=True)):
        modules |= {adapter.full_name(number, name): spec for name, spec in layer_specs(block).items()}
        named = {adapter.full_name(number, name): tensor for name, tensor in compact_state_dict(block, half).items()}
        tensors: dict[str, Tensor] = revert_weight_conversion(adapter.model, named)
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(ready, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(ready, file)
        total += sum(tensor.nbytes for tensor in ready.values())
        del block, named, tensors, ready
    write_index(directory, modules, places, total)
    write_beside(processor, directory, card)


def file_names(blocks: int) -> list[str]:
    """The file of everything outside the blocks, then that of each block."""
    return [f"model-{number:05d}-of-{blocks + 1:05d}.safetensors" for number in range(1, blocks + 2)]


def write_index(
    directory: Path, modules: Mapping[str, Mapping[str, Any]], places: Mapping[str, str], total: int
) -> None:
    """Say in a directory which tensor lies in which file, and in its config what is compressed how.

    Args:
        directory: holds the config of the original.
        modules: full name of every compressed module to its spec.
        places: name of every stored tensor to its file.
        total: bytes of all tensors.
    """
    from casp_pl.checkpoint.registration import CaspConfig

    write_json(directory / _INDEX, {"metadata": {"total_size": total}, "weight_map": dict(places)})
    config = read_json(directory / CONFIG_NAME)
    write_json(directory / CONFIG_NAME, config | {"quantization_config": CaspConfig(modules=modules).to_dict()})


def _stored(path: Path) -> dict[str, int]:
    """Names and bytes of the tensors of a file."""
    with weight_file(path) as reader:
        return {name: reader.get_tensor(name).nbytes for name in reader.keys()}  # noqa: SIM118 - not a mapping
