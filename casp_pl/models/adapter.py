"""Where the parts of a model lie: its decoder blocks, their linears in quantization order, and the output head.

The original's blocks are reached through `originals`, one after the other, whether they are in memory or on disk.

Names are Hugging Face module names. One adapter serves every model whose language model is built of LLaMA-type blocks.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from casp_pl.errors import ConfigError
from casp_pl.models.stored_blocks import StoredBlocks, unlent
from casp_pl.models.surgery import skeleton_of

__all__ = ["ModelAdapter", "adapt"]

_ATTENTION_INPUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LINEAR_GROUPS = (_ATTENTION_INPUT, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))


@dataclass(frozen=True)
class ModelAdapter:
    """A model and the places that compression needs to know.

    Attributes:
        model: the whole Hugging Face model; Any, because what is used of it belongs to no common type.
        decoder: its language model (embeddings, blocks, final norm), without the head; Any, likewise.
        decoder_name: name of `decoder` inside `model`, for example `model.language_model`.
        linear_groups: the linears of a block by name relative to the block; linears of a group read the same input,
            groups stand in the order in which a block computes them.
        low_rank_names: the linears that become low-rank products (CASP: W_q and W_k).
        stored: the original's blocks where they stay on disk; None where they are in memory.
    """

    model: Any
    decoder: Any
    decoder_name: str
    linear_groups: tuple[tuple[str, ...], ...] = _LINEAR_GROUPS
    low_rank_names: tuple[str, ...] = _ATTENTION_INPUT[:2]
    stored: StoredBlocks | None = None

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

    def image_mask(self, input_ids: Tensor) -> Tensor:
        """True where a token is an image patch: (B, T) bool."""
        if self.image_token_id is None:
            return input_ids != input_ids
        return input_ids == self.image_token_id

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
        ConfigError: its blocks are not LLaMA-type; the message names the missing linear.
    """
    names = ("model.language_model", "language_model", "model")
    found = dict(model.named_modules())
    for name in names:
        decoder = found.get(name)
        if isinstance(getattr(decoder, "layers", None), nn.ModuleList) and hasattr(decoder, "embed_tokens"):
            adapter = ModelAdapter(model=model, decoder=decoder, decoder_name=name)
            _check_linears(adapter)
            return adapter
    raise ConfigError(
        f"{type(model).__name__} has no decoder blocks that casp_pl knows (looked for {', '.join(names)}).\n"
        "Supported are LLaVA and LLaMA-type models of transformers."
    )


def _check_linears(adapter: ModelAdapter) -> None:
    for number, block in enumerate(adapter.blocks):
        present = dict(block.named_modules())
        missing = [name for name in adapter.linear_names if name not in present]
        if missing:
            raise ConfigError(f"Block {number} of {type(adapter.model).__name__} has no linear {', '.join(missing)}.")
