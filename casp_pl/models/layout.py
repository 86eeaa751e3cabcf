"""How the parts of a model are found: from its module tree, and where that leaves a choice, by watching it compute.

Known by name are LLaMA-type blocks (LLaMA, Mistral, Qwen2, Qwen3 and the language models of the LLaVA family). Other
decoders with separate q, k and v projections and rotary embeddings are adapted if nothing has to be guessed.
"""

import copy
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from casp_pl.errors import ConfigError
from casp_pl.layers import LowRankLinear, QuantizedLinear

__all__ = ["LLAMA_GROUPS", "block_windows", "find_decoder", "linear_groups_of", "refuse_what_cannot_be_kept"]

LLAMA_GROUPS: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)

_QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")
_CHANGES_OF_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class _StopForwardError(Exception):
    """Ends a forward pass once everything wanted has been seen."""


def find_decoder(model: nn.Module) -> tuple[str, Any]:
    """Name and module of the language model: the one that has embeddings (`embed_tokens`) and blocks (`layers`).

    Raises:
        ConfigError: there is none, or there are several.
    """
    candidates = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and hasattr(module, "embed_tokens")
    }
    if not candidates:
        raise ConfigError(
            f"{type(model).__name__} has no decoder blocks that casp_pl knows (no module with embed_tokens and layers)."
            "\nSupported are the LLaVA family and LLaMA-type models of transformers; see docs/models.md."
        )
    if len(candidates) > 1:
        raise ConfigError(
            f"{type(model).__name__} has several decoders ({', '.join(candidates)}): casp_pl does not guess which one "
            "to compress."
        )
    return next(iter(candidates.items()))


def linear_groups_of(model: nn.Module, decoder: Any) -> tuple[tuple[str, ...], ...]:
    """The linears of a block, those that read the same input together, in the order in which a block computes them.

    Raises:
        ConfigError: blocks differ, hold weights that are no linears, or have no separate q, k and v projections.
    """
    first = _linears(decoder.layers[0])
    for number, block in enumerate(decoder.layers):
        where, linears = f"Block {number} of {type(model).__name__}", _linears(block)
        _refuse_unknown_weights(where, block)
        missing = [name for name in first if name not in linears]
        extra = [name for name in linears if name not in first]
        if missing:
            raise ConfigError(f"{where} has no linear {', '.join(missing)}.")
        if extra:
            raise ConfigError(
                f"{where} has linears that block 0 has not: {', '.join(extra)}.\n"
                "casp_pl compresses models whose blocks are alike."
            )
    if set(first) == {name for group in LLAMA_GROUPS for name in group}:
        return LLAMA_GROUPS
    _check_attention(model, first)
    groups = _watched_groups(decoder)
    together = {f"self_attn.{name}" for name in _QUERY_KEY_VALUE}
    if sorted(name for group in groups for name in group) != sorted(first) or set(groups[0]) != together:
        raise ConfigError(
            f"{type(model).__name__} does not begin a block with q_proj, k_proj and v_proj on one input, or does not "
            f"compute each linear once:\n{', '.join('+'.join(group) for group in groups)}."
        )
    return groups


def block_windows(config: Any) -> tuple[int | None, ...]:
    """For every block how many tokens a token looks back at, itself among them; None where it sees all before it.

    Args:
        config: of the language model. Where it does not tell types of blocks, a window is that of all.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def refuse_what_cannot_be_kept(model: Any, decoder: Any) -> None:
    """Positions must be rotary, and logits the output head's product with the decoder's output.

    Every comparison with the original is built on the latter.

    Raises:
        ConfigError: positions are told in another way, or the logits are changed further; the message names what.
    """
    if not any("rotary" in name for name, _ in decoder.named_modules()):
        raise ConfigError(
            f"{type(model).__name__} has no rotary embeddings: its positions work in a way casp_pl does not know."
        )
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and getattr(head, "bias", None) is not None:
        raise ConfigError(f"{type(model).__name__} has an output head with a bias, which casp_pl does not know.")
    for name in _CHANGES_OF_LOGITS:
        value = getattr(decoder.config, name, None)
        if value not in (None, 1.0):
            raise ConfigError(
                f"{type(model).__name__} changes its logits ({name} = {value}), which casp_pl does not know."
            )


def _linears(block: nn.Module) -> list[str]:
    """The outermost linears of a block, compressed or not."""
    kinds = (nn.Linear, QuantizedLinear, LowRankLinear)
    found: list[str] = []
    for name, module in block.named_modules():
        if isinstance(module, kinds) and not any(name.startswith(other + ".") for other in found):
            found.append(name)
    return found


def _refuse_unknown_weights(where: str, block: nn.Module) -> None:
    for name, _ in block.named_modules():
        last = name.rpartition(".")[2]
        if last in _FUSED:
            raise ConfigError(
                f"{where} has its projections fused in one matrix ({name}): low-rank W_q and W_k need them apart.\n"
                "casp_pl does not guess where to cut it."
            )
        if last == "experts":
            raise ConfigError(f"{where} has a mixture of experts ({name}): casp_pl compresses dense blocks only.")
    covered = tuple(name + "." for name in _linears(block))
    for name, parameter in block.named_parameters():
        if parameter.dim() > 1 and not name.startswith(covered):
            raise ConfigError(f"{where} has a weight that is no linear layer's ({name}): casp_pl does not know it.")


def _check_attention(model: nn.Module, linears: list[str]) -> None:
    """Exactly one attention with separate projections, called `self_attn`."""
    ends = [name.rpartition(".") for name in linears]
    attentions = {prefix for prefix, _, last in ends if last == "q_proj"}
    if len(attentions) > 1:
        raise ConfigError(
            f"{type(model).__name__} has several attentions in a block ({', '.join(sorted(attentions))}): casp_pl does "
            "not guess which one to compress."
        )
    if not all(f"self_attn.{last}" in linears for last in _QUERY_KEY_VALUE):
        raise ConfigError(
            f"{type(model).__name__} has no separate projections self_attn.q_proj, k_proj and v_proj.\n"
            "Supported are the LLaVA family and LLaMA-type models of transformers; see docs/models.md."
        )


@torch.no_grad()
def _watched_groups(decoder: Any) -> tuple[tuple[str, ...], ...]:
    """Groups of block 0 as it computes three tokens: linears that are given the very same tensor in a row.

    Watched is a twin of one block and whatever numbers its memory holds: the model itself may have no weights yet.
    """
    config = copy.deepcopy(decoder.config)
    config._attn_implementation = "eager"  # others may compute on a GPU alone
    with torch.device("meta"):
        twin = type(decoder)(config).eval()  # no dropout, so nobody's random numbers are drawn
    twin.layers = twin.layers[:1]
    twin.to_empty(device="cpu")
    block = twin.layers[0]
    seen: list[tuple[str, Tensor]] = []
    for name in _linears(block):
        block.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: seen.append((name, inputs[0])))
    block.register_forward_hook(_stop)
    with suppress(_StopForwardError):
        twin(input_ids=torch.zeros(1, 3, dtype=torch.int64, device="cpu"), use_cache=False)
    return tuple(_runs(seen))


def _stop(*_: Any) -> None:
    raise _StopForwardError


def _runs(seen: list[tuple[str, Tensor]]) -> Iterator[tuple[str, ...]]:
    group: list[str] = []
    for number, (name, tensor) in enumerate(seen):
        if number and tensor is not seen[number - 1][1]:
            yield tuple(group)
            group = []
        group.append(name)
    if group:
        yield tuple(group)
