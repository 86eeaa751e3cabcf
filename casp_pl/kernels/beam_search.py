"""Which entries of several codebooks sum up closest to a vector: a beam search, for many vectors at once.

|x - sum_k c_k|_M^2 is |x|_M^2 + sum_k (c_k^T M c_k - 2 <c_k, rest_k>) with rest_k = M (x - c_1 - ... - c_{k-1}). So x
is needed only as M x, and with norms c^T M c and images M c in tables a sum is extended by one small product.

Letters: O vectors, K codebooks, C entries a codebook, D group length, B beam width.
"""

import torch
from torch import Tensor
from torch.profiler import record_function

from casp_pl.kernels.compiled import search_loops
from casp_pl.kernels.nearest import best_of_runs, nearest_entries, nearest_scores

__all__ = ["beam_search", "beam_search_reference", "improve_codes", "improve_codes_reference", "sum_of_entries"]


def beam_search(linear: Tensor, codebooks: Tensor, norms: Tensor, images: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Beam search for the codes of all vectors, one codebook after the other.

    Args:
        linear: M x (D, O).
        codebooks: (K, C, D).
        norms: c^T M c (K, C).
        images: M c, transposed (K, D, C).
        width: B, a power of two: partial sums that are kept for every vector; 1 is greedy. From each, one candidate
            of each of B runs of the next codebook is looked at.

    Returns:
        codes (K, O) int64 and their scores |x - sum_k c_k|_M^2 - |x|_M^2 (O,).
    """
    if (loops := search_loops(linear)) is None:
        return beam_search_reference(linear, codebooks, norms, images, width)
    codes = torch.empty(len(codebooks), linear.shape[1], dtype=torch.int64, device=linear.device)
    scores = torch.empty(linear.shape[1], dtype=torch.float32, device=linear.device)
    with record_function("casp_pl::beam_search"):
        loops.search(linear, codebooks.transpose(1, 2), norms, images, width, codes, scores)
    return codes, scores


def beam_search_reference(
    linear: Tensor, codebooks: Tensor, norms: Tensor, images: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """`beam_search` in operations of torch: what runs on a GPU, and the oracle of the compiled loop."""
    rest, scores = linear[:, None], linear.new_zeros(1, linear.shape[1])  # (D, B, O), (B, O)
    codes = torch.empty(0, *scores.shape, dtype=torch.int64, device=linear.device)  # (k, B, O)
    *inner, last = codebooks
    for k, codebook in enumerate(inner):
        runs = min(width, len(codebook))
        entries, gains = best_of_runs(rest.flatten(1), codebook, norms[k], runs)
        totals = (gains.view(runs, *scores.shape) + scores).flatten(0, 1)  # (candidates, O)
        kept = _smallest(totals, width)
        parent, chosen, scores = kept % len(scores), entries.view(totals.shape).gather(0, kept), totals.gather(0, kept)
        codes = torch.cat([codes.gather(1, parent.expand(k, *parent.shape)), chosen[None]])
        image = images[k].index_select(1, chosen.flatten()).view(-1, *chosen.shape)
        rest = rest.gather(1, parent.expand(len(rest), *parent.shape)) - image
    last_norms = norms[len(inner)]
    scores, best = (nearest_scores(rest.flatten(1), last, last_norms).view(scores.shape) + scores).min(
        dim=0, keepdim=True
    )
    rest = rest.gather(1, best.expand(len(rest), *best.shape))[:, 0]
    codes = codes.gather(1, best.expand(len(inner), *best.shape))[:, 0]
    return torch.cat([codes, nearest_entries(rest, last, last_norms)[None]]), scores[0]


def improve_codes(
    gradient: Tensor,
    scales: Tensor,
    codebooks: Tensor,
    norms: Tensor,
    images: Tensor,
    width: int,
    codes: Tensor,
    fall: Tensor,
) -> Tensor:
    """Give every vector the better of its codes and those of a fresh beam search.

    Args:
        gradient: M times the error of the scaled sums as they are (D, O).
        scales: of the sums (O,); where it is 0, codes mean nothing and may change.
        codebooks: (K, C, D).
        norms: c^T M c (K, C).
        images: M c, transposed (K, D, C).
        width: B, see `beam_search`.
        codes: (K, O) int64, contiguous, changed in place.
        fall: grows by what the loss, error^T M error, of a vector loses (O,).

    Returns:
        What the scaled sums gain (D, O).
    """
    if (loops := search_loops(gradient)) is None:
        return improve_codes_reference(gradient, scales, codebooks, norms, images, width, codes, fall)
    change = torch.empty_like(gradient, memory_format=torch.contiguous_format)
    with record_function("casp_pl::improve_codes"):
        loops.improve(gradient, scales, codebooks.transpose(1, 2), norms, images, width, codes, change, fall)
    return change


def improve_codes_reference(
    gradient: Tensor,
    scales: Tensor,
    codebooks: Tensor,
    norms: Tensor,
    images: Tensor,
    width: int,
    codes: Tensor,
    fall: Tensor,
) -> Tensor:
    """`improve_codes` in operations of torch: what runs on a GPU, and the oracle of the compiled loop."""
    rest = gradient * torch.where(scales == 0, 0, 1 / scales)
    value, image = sum_of_entries(codebooks, codes), _sum_of_images(images, codes)
    score = -(value * (image + 2 * rest)).sum(dim=0)
    found, found_score = beam_search_reference(rest + image, codebooks, norms, images, width)
    codes.copy_(torch.where(found_score < score, found, codes))
    change = (sum_of_entries(codebooks, codes) - value) * scales
    turn = (_sum_of_images(images, codes) - image) * scales
    fall += (change * (2 * gradient - turn)).sum(dim=0)
    return change


def sum_of_entries(codebooks: Tensor, codes: Tensor) -> Tensor:
    """Sum over k of the entries codes (K, O) of codebooks (K, C, D) -> (D, O)."""
    value = codebooks[0].index_select(0, codes[0])
    for codebook, chosen in zip(codebooks[1:], codes[1:], strict=True):
        value = value + codebook.index_select(0, chosen)
    return value.T


def _sum_of_images(images: Tensor, codes: Tensor) -> Tensor:
    return torch.stack([image.index_select(1, chosen) for image, chosen in zip(images, codes, strict=True)]).sum(dim=0)


def _smallest(totals: Tensor, count: int) -> Tensor:
    """Rows of the `count` smallest of every column: (candidates, O) -> (count or fewer, O)."""
    if count >= len(totals):
        return torch.arange(len(totals), device=totals.device)[:, None].expand_as(totals)
    return totals.topk(count, dim=0, largest=False).indices
