"""What rounding each linear costs the model's next-token distribution: the score that bits are best given out by.

To second order, an error dW of one weight moves the distribution by a KL divergence of E[<dW, g>^2] / 2, where g is
the gradient of the log-likelihood of tokens that the model itself draws (E[g g^T] is the Fisher matrix). Rounding with
error feedback leaves dW = E L^-1 for H = L D L^T and white E (QuIP, arXiv 2307.13304, section 4), so the divergence is
|g L^-T|^2 / 2 times the mean square of E.

Gradients are computed backwards block by block from the blocks' inputs, which are kept: beside those, no more than one
block's activations, gradients and second moments are in memory. Shapes: N tokens, O out, I in.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from casp_pl.linalg import full_width_products, safe_cholesky
from casp_pl.models.activations import Keep, in_memory
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.streams import BlockBatch, first_block_batches, run_block, run_blocks
from casp_pl.modules.end_to_end import answer_mask, target_mask

__all__ = ["linear_sensitivities"]

_CHUNK = 512  # tokens whose logits are computed at once
_DAMPING = 1e-2  # of second moments, as the quantizers have it


def linear_sensitivities(
    adapter: ModelAdapter,
    batches: Sequence[Mapping[str, Any]],
    *,
    seed: int,
    autocast: torch.dtype | None = None,
    keep: Keep = in_memory,
) -> dict[str, float]:
    """Full name of every linear -> nats of KL that rounding it alone costs, over the noise of rounding.

    The noise is the mean square of what rounding does to a weight over the weight's own, about 2^(-2 b) at b bits. The
    KL is the mean over the tokens of plain texts plus the mean over those of answers.

    Args:
        adapter: the original model; nothing in it is trained or changed.
        batches: collated samples, some thousands of tokens in all.
        seed: of the tokens that the model draws.
        autocast: see `BlockBatch.autocast`.
        keep: keeps the inputs of all blocks.
    """
    states = [first_block_batches(adapter, batches, autocast, keep)]
    for block in adapter.originals():
        states.append(run_blocks(block, states[-1], keep))
    generator = torch.Generator(adapter.device).manual_seed(seed)
    outputs = states.pop()
    gradients = [
        _gradient_of_draws(adapter, batch, state.hidden, generator)
        for batch, state in zip(batches, outputs, strict=True)
    ]
    scores: dict[str, float] = {}
    numbers = range(len(adapter.blocks))[::-1]
    for number, block in zip(numbers, adapter.originals(numbers), strict=True):
        found, gradients = _through_block(adapter, block, states.pop(), gradients)
        scores |= {adapter.full_name(number, name): score for name, score in found.items()}
    return scores


def _gradient_of_draws(
    adapter: ModelAdapter, batch: Mapping[str, Any], hidden: Tensor, generator: torch.Generator
) -> Tensor:
    """Gradient (B, T, I) of sum_n sqrt(share_n) times the log-likelihood of a token drawn at n.

    Draws are independent, so a square of it has the mean of the squares of all n, weighed by their shares of the KL.
    """
    targets = target_mask(batch)
    answers = answer_mask(batch)[targets]
    counts = torch.stack([(~answers).sum(), answers.sum()]).clamp_min(1)
    shares = (1 / counts)[answers.long()]
    head = adapter.head.weight.detach().float()
    with torch.enable_grad():
        hidden = hidden.detach().to(adapter.device).requires_grad_()
        normed = adapter.decoder.norm(hidden)[targets].float()
        gradient = torch.zeros_like(normed)
        with torch.no_grad(), full_width_products():
            for start in range(0, len(normed), _CHUNK):
                rows = slice(start, start + _CHUNK)
                off = (normed[rows] @ head.T).softmax(-1)
                drawn = off.multinomial(1, generator=generator)
                off.scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=off.dtype))
                gradient[rows] = shares[rows, None].sqrt() * (off @ head)
        (result,) = torch.autograd.grad(normed, hidden, gradient)
    return result


def _through_block(
    adapter: ModelAdapter, block: nn.Module, states: Sequence[BlockBatch], gradients: Sequence[Tensor]
) -> tuple[dict[str, float], list[Tensor]]:
    """Scores of a block's linears by relative name, and the gradients at its inputs out of those at its outputs."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in adapter.group_heads}
    slopes: dict[str, list[Tensor]] = {name: [] for name in adapter.linear_names}
    before = []
    for state, gradient in zip(states, gradients, strict=True):
        outputs: dict[str, Tensor] = {}
        handles = [
            block.get_submodule(name).register_forward_hook(_note(name, state.real, inputs, outputs))
            for name in adapter.linear_names
        ]
        with torch.enable_grad():
            hidden = state.hidden.detach().to(gradient.device).requires_grad_()
            result = run_block(block, state.with_hidden(hidden))
        for handle in handles:
            handle.remove()
        first, *others = torch.autograd.grad(result, [hidden, *outputs.values()], gradient.to(result))
        before.append(first)
        for name, slope in zip(outputs, others, strict=True):
            slopes[name].append(slope[state.real].float())
    scores = {}
    for group in adapter.linear_groups:
        shape = _feedback_shape(torch.cat(inputs[group[0]]))
        for name in group:
            squares = [_square(slope, x @ shape.T) for slope, x in zip(slopes[name], inputs[group[0]], strict=True)]
            linear: Any = block.get_submodule(name)
            scores[name] = float(linear.weight.detach().float().square().mean()) * sum(squares) / len(squares) / 2
    return scores, before


def _note(name: str, real: Tensor, inputs: dict[str, list[Tensor]], outputs: dict[str, Tensor]) -> Any:
    """Forward hook that keeps what a linear reads, where that is wanted, and what it gives."""

    def hook(_: nn.Module, positional: tuple[Tensor, ...], output: Tensor) -> None:
        outputs[name] = output
        if name in inputs:
            inputs[name].append(positional[0].detach()[real].float())

    return hook


def _feedback_shape(x: Tensor) -> Tensor:
    """L^-1 (I, I) of the second moment of x (N, I): the rows of E L^-1 are what feedback makes of white errors."""
    with full_width_products():
        factor, _ = safe_cholesky(x.T @ x / len(x), _DAMPING)
    unit = factor / factor.diagonal()
    identity = torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
    inverse: Tensor = torch.linalg.solve_triangular(unit, identity, upper=False)
    return inverse.float()


def _square(slope: Tensor, x: Tensor) -> float:
    """|slope^T x|^2, the squared norm of a weight's gradient."""
    with full_width_products():
        return float((slope.T @ x).square().sum(dtype=torch.float64))
