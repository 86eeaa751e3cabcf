"""Where the parts of a model lie: its decoder blocks, their linears in quantization order, and the output head.

The original's blocks are reached through `originals`, one after the other, whether they are in memory or on disk.

Names are Hugging Face module names. How the parts are found is in `models/layout.py`.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from casp_pl.models.layout import (
    LLAMA_GROUPS,
    block_windows,
    find_decoder,
    linear_groups_of,
    refuse_what_cannot_be_kept,
)
from casp_pl.models.stored_blocks import StoredBlocks, unlent
from casp_pl.models.surgery import skeleton_of

__all__ = ["ModelAdapter", "adapt"]


@dataclass(frozen=True)
class ModelAdapter:
    """A model and the places that compression needs to know.

    Attributes:
        model: the whole Hugging Face model; Any, because what is used of it belongs to no common type.
        decoder: its language model (embeddings, blocks, final norm), without the head; Any, likewise.
        decoder_name: name of `decoder` inside `model`, for example `model.language_model`.
        linear_groups: the linears of a block by name relative to the block; linears of a group read the same input,
            groups stand in the order in which a block computes them.
        low_rank_names: the linears that become low-rank products (CASP: W_q and W_k). What follows them in the block,
            their biases, norms of queries and keys and rotary embeddings, works on the product as on the original.
        stored: the original's blocks where they stay on disk; None where they are in memory.
        read_outside: of a model whose blocks stay on disk, everything outside them, read again: a model without blocks.
    """

    model: Any
    decoder: Any
    decoder_name: str
    linear_groups: tuple[tuple[str, ...], ...] = LLAMA_GROUPS
    low_rank_names: tuple[str, ...] = LLAMA_GROUPS[0][:2]
    stored: StoredBlocks | None = None
    read_outside: Callable[[], nn.Module] | None = None

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks as they stand in the model now."""
        blocks: nn.ModuleList = self.decoder.layers
        return blocks

    def originals(self, numbers: Iterable[int] | None = None) -> Iterator[nn.Module]:
        """The original's blocks in order, or those of `numbers`; one that is stored is in memory while it is in use."""
        for number in range(len(self.blocks)) if numbers is None else numbers:
            yield self.blocks[number] if self.stored is None else self.stored.read(number)

    def own(self, original: nn.Module) -> nn.Module:
        """A block that may be changed: a copy, or the block itself where `originals` read it for its caller alone."""
        return copy.deepcopy(original) if self.stored is None else original

    def skeleton(self, number: int) -> nn.Module:
        """The original's block on the meta device, a copy that may be changed."""
        return skeleton_of(self.blocks[number]) if self.stored is None else self.stored.skeleton(number)

    def outside_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of everything but the decoder blocks."""
        with self.with_blocks([]) as model:
            parameters = list(model.parameters())
        yield from parameters

    @contextmanager
    def blocks_alone(self) -> Iterator[None]:
        """Inside, a model whose blocks stay on disk holds no weights outside them either; they are read again after it.

        Embeddings, head and vision tower are a quarter of what the work on one block of a 7B model takes. Where
        something fails inside, the run ends, and nothing is read.
        """
        if self.read_outside is None:
            yield
            return
        put_away = list(self.outside_parameters())
        for parameter in put_away:
            parameter.data = parameter.data.new_empty(0)
        yield
        for parameter, read in zip(put_away, self.read_outside().parameters(), strict=True):
            parameter.data = read.data.to(parameter.device)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        device: torch.device = self.decoder.embed_tokens.weight.device
        return device

    @property
    def head(self) -> nn.Linear:
        """The output head: (V, I), never compressed."""
        head: nn.Linear = self.model.get_output_embeddings()
        return head

    @property
    def image_token_id(self) -> int | None:
        """Token that stands for one image patch; None for a text model."""
        return getattr(self.model.config, "image_token_id", None)

    @property
    def linear_names(self) -> tuple[str, ...]:
        """All linears of a block, relative names, in quantization order."""
        return tuple(name for group in self.linear_groups for name in group)

    @property
    def group_heads(self) -> tuple[str, ...]:
        """The first linear of every group: what it reads, all of its group read."""
        return tuple(group[0] for group in self.linear_groups)

    def full_name(self, block: int, name: str) -> str:
        """Name of a block's linear inside the whole model."""
        return f"{self.decoder_name}.layers.{block}.{name}"

    def shapes(self, block: int) -> dict[str, tuple[int, int]]:
        """(O, I) of every linear of a block by relative name, compressed or not."""
        linears: dict[str, Any] = {name: unlent(self.blocks[block]).get_submodule(name) for name in self.linear_names}
        return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}

    def window(self, block: int) -> int | None:
        """How many tokens a token of this block looks back at, itself among them; None where it sees all before it."""
        return block_windows(self.decoder.config)[block]

    @property
    def shortest_window(self) -> int | None:
        """The least of all blocks' windows; None where every block sees all."""
        return min((window for window in block_windows(self.decoder.config) if window is not None), default=None)

    def image_mask(self, input_ids: Tensor) -> Tensor:
        """True where a token is a patch of an image or video: (B, T) bool."""
        tokens = (self.image_token_id, getattr(self.model.config, "video_token_id", None))
        known = [token for token in tokens if token is not None]
        return torch.isin(input_ids, torch.tensor(known, dtype=input_ids.dtype, device=input_ids.device))

    @contextmanager
    def with_blocks(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        """Inside, the model runs with these blocks in place of its own; everything else is shared."""
        original = self.decoder.layers
        self.decoder.layers = nn.ModuleList(blocks)
        try:
            yield self.model
        finally:
            self.decoder.layers = original


def adapt(model: nn.Module) -> ModelAdapter:
    """Find the parts of a model.

    Raises:
        ConfigError: its blocks are of a kind that casp_pl does not know, or its parts would have to be guessed.
    """
    name, decoder = find_decoder(model)
    refuse_what_cannot_be_kept(model, decoder)
    groups = linear_groups_of(model, decoder)
    low_rank = tuple(linear for linear in groups[0] if linear.endswith(("q_proj", "k_proj")))
    return ModelAdapter(model, decoder, name, groups, low_rank)
