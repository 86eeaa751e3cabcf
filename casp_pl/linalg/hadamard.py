"""Hadamard matrices, computed instead of listed: entries +-1 and H H^T = n I.

Constructions (any textbook; Sylvester 1867, Paley 1933), q a prime power:

    Kronecker   n = a b from the orders a and b; with a = 2 this is Sylvester's doubling
    Paley I     n = q + 1,    q = 3 mod 4
    Paley II    n = 2(q + 1), q = 1 mod 4

They reach every multiple of 4 up to 200 but 92, 116, 156, 172, 184 and 188. What happens at other orders is told in
`orthogonal.py`.
"""

from functools import lru_cache

import torch
from torch import Tensor

from casp_pl.linalg.finite_field import prime_power, residue_matrix

__all__ = ["hadamard_matrix", "is_constructible"]

_LARGEST_PALEY = 1024  # a factor of a transform is applied as a dense matrix: beyond, it would cost more than it brings


@lru_cache(maxsize=4096)
def is_constructible(order: int) -> bool:
    """Whether `hadamard_matrix` knows this order."""
    return order in (1, 2) or _paley_field(order) is not None or _split(order) is not None


def hadamard_matrix(order: int) -> Tensor:
    """A Hadamard matrix (n, n), int8. Powers of two give Sylvester's in natural order.

    Raises:
        ValueError: none is known here, see `is_constructible`.
    """
    if order <= 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device="cpu")[:order, :order]
    split = _split(order)
    if split is not None:
        return torch.kron(hadamard_matrix(split[0]), hadamard_matrix(split[1]))
    field = _paley_field(order)
    if field is None:
        raise ValueError(f"no Hadamard matrix of order {order} can be constructed")
    return _paley_one(field) if order == field + 1 else _paley_two(field)


def _split(order: int) -> tuple[int, int] | None:
    """Two orders with this product, both known, the first as small as possible."""
    if order % 4:
        return None
    divisors = (d for d in range(2, int(order**0.5) + 1) if order % d == 0)
    return next(((d, order // d) for d in divisors if is_constructible(d) and is_constructible(order // d)), None)


def _paley_field(order: int) -> int | None:
    """The q of Paley's first or second construction of this order."""
    if order % 4 or order > _LARGEST_PALEY:
        return None
    for field, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if field % 4 == remainder and prime_power(field):
            return field
    return None


def _bordered(field: int, below: int) -> Tensor:
    """[[0, 1], [below, Q]] (q + 1, q + 1)."""
    matrix = torch.zeros(field + 1, field + 1, dtype=torch.int8, device="cpu")
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1, below, residue_matrix(field)
    return matrix


def _paley_one(field: int) -> Tensor:
    return _bordered(field, -1) + torch.eye(field + 1, dtype=torch.int8, device="cpu")


def _paley_two(field: int) -> Tensor:
    signs, diagonal = (
        torch.tensor(rows, dtype=torch.int8, device="cpu") for rows in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]])
    )
    conference = _bordered(field, 1)
    return torch.kron(conference, signs) + torch.kron(torch.eye(field + 1, dtype=torch.int8, device="cpu"), diagonal)
