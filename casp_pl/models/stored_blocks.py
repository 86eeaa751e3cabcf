"""Decoder blocks that stay on disk and are read when they are needed, one at a time.

transformers names tensors in memory otherwise than in files, and some it puts together out of several; its own
conversion mapping is applied to the tensors of one block at a time.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from casp_pl.errors import IntegrityError
from casp_pl.layers import materialized
from casp_pl.models.soundness import require_materialized
from casp_pl.models.surgery import skeleton_of
from casp_pl.models.weight_files import weight_file

__all__ = ["LentBlock", "StoredBlocks", "unlent"]


@dataclass(frozen=True)
class _Source:
    """A stored tensor: its name and file, its name in the model, and the pattern of the converter that it goes into."""

    key: str
    file: Path
    name: str
    pattern: str | None


class StoredBlocks:
    """The original's decoder blocks by number, each read anew from safetensors.

    While one is in use, a thread reads through the next, so that it lies in the system's file cache when it is wanted;
    the process itself holds nothing of it.

    Args:
        model: the Hugging Face model; its blocks are on the meta device and stay there.
        blocks: these blocks, whose dtype is the one to compute in.
        prefix: what their names in the model begin with, for example `model.language_model.layers.`.
        files: every stored tensor and its file.
        device: where blocks are put.

    Raises:
        IntegrityError: a tensor of a block is not stored; the message names it.
    """

    def __init__(
        self, model: Any, blocks: nn.ModuleList, prefix: str, files: Mapping[str, Path], device: torch.device
    ) -> None:
        self.device = device
        self._model, self._prefix = model, prefix
        self._skeletons = list(blocks)
        self._converters = _conversions(model)
        self._sources: list[list[_Source]] = [[] for _ in blocks]
        names = model.state_dict()
        for key in sorted(files, key=_natural):
            name, pattern = self._name_in_memory(key, names)
            place = re.match(rf"{re.escape(prefix)}(\d+)\.", name)
            if place and int(place[1]) < len(self._sources) and name in names:
                self._sources[int(place[1])].append(_Source(key, files[key], name, pattern))
        model._weight_conversions = [conversion for conversion in self._converters if conversion.was_used()]
        self._refuse_missing()
        self._ahead: Future[None] | None = None
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")

    def __len__(self) -> int:
        return len(self._skeletons)

    def skeleton(self, number: int) -> nn.Module:
        """The block on the meta device, a copy that may be changed."""
        return skeleton_of(self._skeletons[number])

    def read(self, number: int) -> nn.Module:
        """The block with its weights, frozen and in evaluation mode; it belongs to the caller.

        Raises:
            IntegrityError: a file changed or broke since the model was opened.
        """
        if self._ahead is not None:
            self._ahead.result()  # two readers at once would only disturb each other; what it met is raised here
        block = self.skeleton(number)
        try:
            block.load_state_dict(self._tensors(number, block), assign=True)
        except RuntimeError as error:
            raise IntegrityError(f"{self._prefix}{number}: {str(error).splitlines()[-1].strip()}") from error
        require_materialized(block, f"{self._prefix}{number}.")
        following = (number + 1) % len(self)
        self._ahead = self._reader.submit(self._read_through, following) if following != number else None
        return block.eval().requires_grad_(False).to(self.device)

    def _tensors(self, number: int, block: nn.Module) -> dict[str, Tensor]:
        """Tensors of a block by relative name, in the dtype of its skeleton."""
        dtypes = {name: tensor.dtype for name, tensor in block.state_dict().items()}
        own = f"{self._prefix}{number}."
        tensors: dict[str, Tensor] = {}
        open_converters: dict[str, Any] = {}
        for source, tensor in self._stored(number):
            name = source.name.removeprefix(own)
            if tensor.is_floating_point():
                tensor = tensor.to(dtypes[name])
            if source.pattern is None:
                tensors[name] = tensor
                continue
            if source.name not in open_converters:
                open_converters[source.name] = self._converter(source.pattern)
            open_converters[source.name].add_tensor(source.name, source.key, source.pattern, tensor)
        for name, converter in open_converters.items():
            made = converter.convert(name, model=self._model, config=self._model.config)
            for target, value in made.items():
                tensors[target.removeprefix(own)] = value[0] if isinstance(value, list) else value
        return tensors

    def _stored(self, number: int) -> Iterator[tuple[_Source, Tensor]]:
        """The tensors of a block as they are stored, file by file; in a file, in the order of `_sources`."""
        by_file = sorted(self._sources[number], key=lambda source: source.file)
        for file, sources in groupby(by_file, key=lambda source: source.file):
            with weight_file(file) as reader:
                for source in sources:
                    yield source, reader.get_tensor(source.key)

    def _read_through(self, number: int) -> None:
        for _ in self._stored(number):
            pass

    def _converter(self, pattern: str) -> Any:
        return copy.deepcopy(next(c for c in self._converters if pattern in c.source_patterns))

    def _name_in_memory(self, key: str, names: Mapping[str, Any]) -> tuple[str, str | None]:
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings: Any = [entry for entry in self._converters if isinstance(entry, WeightRenaming)]
        converters: Any = [entry for entry in self._converters if isinstance(entry, WeightConverter)]
        base: Any = (self._model.base_model_prefix, names)
        name, pattern = rename_source_key(key, renamings, converters, *base)
        if name not in names and key in names:  # as transformers does: the file has the names of memory already
            return rename_source_key(key, [], [], *base)
        return name, pattern

    def _refuse_missing(self) -> None:
        for number, sources in enumerate(self._sources):
            if any(source.pattern is not None for source in sources):
                continue  # one source makes several tensors: `read` finds what is missing
            stored = {source.name for source in sources}
            for name in self._skeletons[number].state_dict():
                if f"{self._prefix}{number}.{name}" not in stored:
                    raise IntegrityError(f"{self._prefix}{number}.{name} is in none of the model's files.")


class LentBlock(nn.Module):
    """Stands in a model for a block that is not in memory: it is read for a forward pass and dropped after it.

    It has no parameters of its own, so moving, saving and counting the model leave it out.

    Args:
        skeleton: the block on the meta device; attributes that are asked of this module are looked up there.
        read: gives the block with its weights.
    """

    def __init__(self, skeleton: nn.Module, read: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.__dict__["skeleton"] = skeleton  # past nn.Module, which would register it
        self.read = read

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["skeleton"], name)

    def forward(self, *positional: Any, **keywords: Any) -> Any:
        """What the block gives; its compressed weights are made dense once for the pass, as evaluation does."""
        block = self.read()
        with materialized(block):
            return block(*positional, **keywords)


def unlent(block: nn.Module) -> nn.Module:
    """The structure of a block, wherever its weights are."""
    skeleton: nn.Module = block.__dict__["skeleton"] if isinstance(block, LentBlock) else block
    return skeleton


def _conversions(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model))


def _natural(key: str) -> list[tuple[int, int | str]]:
    """Numbers in a name count as numbers: experts are put together in this order."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in key.split(".")]
