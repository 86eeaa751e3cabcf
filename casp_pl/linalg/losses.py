"""What an approximate weight costs on the layer's inputs. Letters: O out, I in."""

import torch
from torch import Tensor

__all__ = ["proxy_loss", "relative_proxy_loss"]

_STRIP = 512  # columns at a time


def proxy_loss(weight: Tensor, approx: Tensor, second_moment: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T), the squared error of the outputs summed over the tokens that make up H.

    Args:
        weight: W (O, I).
        approx: Q (O, I).
        second_moment: H (I, I), symmetric.
    """
    return _energy((weight.detach() - approx.detach()).to(second_moment.dtype), second_moment)


def relative_proxy_loss(weight: Tensor, approx: Tensor, second_moment: Tensor) -> float:
    """`proxy_loss` over tr(W H W^T): 0 is exact, 1 as bad as no layer at all, infinity an error where W gives zero."""
    loss = proxy_loss(weight, approx, second_moment)
    if loss == 0.0:
        return 0.0
    energy = _energy(weight.detach().to(second_moment.dtype), second_moment)
    return loss / energy if energy > 0.0 else float("inf")


def _energy(rows: Tensor, second_moment: Tensor) -> float:
    """tr(E H E^T), H symmetric: what is below its diagonal counts twice. The sum of products is in float64."""
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], _STRIP):
        stop = start + _STRIP
        own, columns = rows[:, start:stop], second_moment[:, start:stop]
        products = torch.addmm(own @ columns[start:stop], rows[:, stop:], columns[stop:], alpha=2)
        total += products.mul_(own).sum(dtype=torch.float64)
    return float(total)
