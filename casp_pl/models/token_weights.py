"""How much a token counts in the moments that a linear is quantized with: none as much as a thousand others.

In many decoders the first token of a sequence has a few huge activations (massive activations, arXiv 2402.17762): what
a down projection reads of it can have hundreds of times the norm of the rest (2,983 beside 6.4 in block 11 of
SmolLM2-135M). Squared, that is nearly all of a second moment. Quantizers then spare this token and give up the others,
although the next norm takes its size away again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from casp_pl.processes import sum_of_all

__all__ = ["energy_limit", "root_weights"]


@torch.no_grad()
def energy_limit(batches: Sequence[Tensor], times: float | None, device: torch.device) -> Tensor:
    """So many times the geometric mean of |x|^2 over the tokens of all processes, float64 (); infinite for None.

    Args:
        batches: what a linear reads of each batch, (N, I) each; tokens of zeros are left out.
        times: a factor above 0.
        device: where it is computed, and the result lies; batches may wait elsewhere.
    """
    if times is None:
        return torch.tensor(torch.inf, dtype=torch.float64, device=device)
    total = torch.zeros(2, dtype=torch.float64, device=device)  # of logarithms, and of tokens
    for batch in batches:
        logarithms = _energy(batch.to(device)).log()
        seen = logarithms.isfinite()
        total += torch.stack([logarithms[seen].sum(), seen.sum()])
    logarithm, count = sum_of_all(total)
    typical: Tensor = (logarithm / count.clamp(min=1)).exp()
    return times * typical


def root_weights(limit: Tensor, *inputs: Tensor) -> Tensor:
    """Factors (N, 1), at most 1, with which |x|^2 of every token is within the limit in all of the tensors (N, I)."""
    energies = torch.stack([_energy(part) for part in inputs]).amax(dim=0)
    return (limit / energies).clamp_(max=1).sqrt_()[:, None]  # of zeros: infinity, cut to 1


def _energy(inputs: Tensor) -> Tensor:
    """|x|^2 (N,) of each row, float64."""
    norms: Tensor = torch.linalg.vector_norm(inputs, dim=1, dtype=torch.float32)
    return norms.double().square()
